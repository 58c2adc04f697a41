"""Converts ALPRO's checkpoints: those of Youku-mPLUG, and Salesforce's release with its prompter and QA model.

The model is described in `docs/models/alpro.md`.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax

from ymplug_jax.convert import bert
from ymplug_jax.convert.mplug_video import TIMESFORMER, timesformer_of
from ymplug_jax.convert.plan import Layout, Plan, UnknownModel, need
from ymplug_jax.convert.rules import Rule, linear, norm, under
from ymplug_jax.models.alpro import ALPRO, RESIZE, init, prompter_of
from ymplug_jax.models.timesformer import TimeSformer

_HEADS = (
    *linear("vision_proj", "vision_proj"),
    *linear("text_proj", "text_proj"),
    Rule("temp", "->", ("temperature",)),
    *linear("itm_head", "match"),
    *linear("visn_fc", "connector/proj"),
    *norm("visn_layer_norm", "connector/norm"),
)
YOUKU = (
    *under("visual_encoder.", "vision/", TIMESFORMER),
    *under("text_encoder.", "", bert.BERT),
    *_HEADS,
    *linear("cls_head.0", "head/hidden"),
    *linear("cls_head.2", "head/out"),
)


def _salesforce_name(rule: Rule) -> Rule:
    name = rule.source.replace("temporal_embed", "time_embed").replace("temporal_ln", "temporal_norm1")
    return rule._replace(source=name)


# Salesforce uses other names and one bias for q, k and v. Its key part cancels in softmax and is dropped.
SALESFORCE_TIMESFORMER = (
    *(_salesforce_name(rule) for rule in TIMESFORMER if not re.search(r"[qv]_bias", rule.source)),
    *(
        Rule(f"blocks.{{}}.{a}.qkv.bias", "(part n h) -> n h", (f"blocks/{a}/q/bias", None, f"blocks/{a}/v/bias"))
        for a in ("attn", "temporal_attn")
    ),
)


def _salesforce(text: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (
        *under("visual_encoder.model.", "vision/", SALESFORCE_TIMESFORMER),
        *under("text_encoder.", "", text),
        *_HEADS,
    )


SALESFORCE = (
    *_salesforce(bert.BERT),
    *linear("mpm_head.0", "entity/hidden"),
    *linear("mpm_head.2", "entity/out"),
    *under("prompter.", "prompter/", _salesforce(bert.BERT)),
    Rule("prompter.video_prompt_feat", "k e -> k e", ("prompter/entities",)),
)
QA = (
    *_salesforce(tuple(rule._replace(source=rule.source.removeprefix("bert.")) for rule in bert.BERT)),
    *linear("classifier.0", "head/hidden"),
    *linear("classifier.2", "head/out"),
)
# Buffers, and parameters that the model does not use: poolers, the video encoder's classifier, prompts of images.
_DROP = (
    r"(prompter\.)?text_encoder\.(bert\.)?embeddings\.position_ids",
    r"(prompter\.)?text_encoder\.(bert\.)?pooler\..*",
    r"(prompter\.)?visual_encoder\.model\.head\..*",
    r"prompter\.image_prompt_feat",
)
_TIED = tuple((f"text_encoder.{copy}", f"text_encoder.{original}") for copy, original in bert.TIED)
_BOTH = (*_TIED, *((f"prompter.{copy}", f"prompter.{original}") for copy, original in _TIED))
LAYOUTS = {
    "youku": Layout(YOUKU, drop=_DROP[:2], tied=_TIED),
    "salesforce": Layout(SALESFORCE, drop=_DROP, tied=_BOTH),
    # The checkpoint of a prompter has prompt features that its training never fills.
    "prompter": Layout(_salesforce(bert.BERT), drop=(*_DROP, r"(video|image)_prompt_feat"), tied=_TIED),
    "salesforce_qa": Layout(QA, drop=_DROP),
}
HEADS = {
    "youku": {768: 8, 1024: 16},
    "salesforce": {768: 12},
}  # attention heads of the video encoder by variant and width
__all__ = ["LAYOUTS", "RESIZE", "plan"]


def layout_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Name of the layout of these tensors, a key of `LAYOUTS`.

    Raises:
      UnknownModel: the tensors are not an ALPRO's.
    """
    if "visual_encoder.cls_token" in shapes:
        return "youku"
    need(shapes, "visual_encoder.model.cls_token")
    if "video_prompt_feat" in shapes:
        return "prompter"
    return "salesforce_qa" if "text_encoder.embeddings.word_embeddings.weight" in shapes else "salesforce"


def model_of(
    shapes: Mapping[str, tuple[int, ...]], layout: str, heads: Mapping[str, int], first: int | None = None
) -> ALPRO:
    """The ALPRO module for these tensors, with the heads that they have.

    Args:
      shapes: tensor name -> shape.
      layout: key of `LAYOUTS`.
      heads: attention heads, see `plan.heads_of`.
      first: number of BERT layers in the text encoder; None: half.

    Raises:
      UnknownModel: the tensors are not an ALPRO's.
    """
    variant = "youku" if layout == "youku" else "salesforce"
    inner = "visual_encoder." if variant == "youku" else "visual_encoder.model."
    names = {name.replace("time_embed", "temporal_embed"): shape for name, shape in shapes.items()}
    width = need(shapes, f"{inner}cls_token")[-1]
    count = heads.get("vision") or HEADS[variant].get(width)
    vision: TimeSformer = timesformer_of(names, inner, {**heads, "vision": count} if count else heads)
    encoder = {name.removeprefix("text_encoder."): shape for name, shape in shapes.items() if "text_encoder." in name}
    if layout == "salesforce_qa":
        encoder = {f"bert.{name}": shape for name, shape in encoder.items()}
    text, fusion = bert.bert_of(encoder, heads, first)

    def size(name: str) -> int:
        return shapes[name][0] if name in shapes else 0

    return ALPRO(
        vision=vision,
        text=text,
        fusion=fusion,
        contrastive_width=size("vision_proj.weight"),
        matching="itm_head.weight" in shapes,
        masked="cls.predictions.bias" in encoder,
        classes=size("cls_head.2.weight") or size("classifier.2.weight"),
        entities=size("mpm_head.2.weight"),
        variant=variant,
    )


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int], first: int | None = None) -> Plan:
    """Recognise an ALPRO in any of the four layouts, with the heads of its task and, if present, its prompter."""
    layout = layout_of(shapes)
    model = model_of(shapes, layout, heads, first)
    if model.classes and model.variant == "salesforce":
        hidden = need(shapes, "classifier.0.weight")[0]
        if hidden != 2 * model.text.width:
            raise UnknownModel(
                f"classifier.0.weight has {hidden} rows, not {2 * model.text.width}; give Salesforce's QA model"
            )
    whole = dataclasses.replace(model, entities=0)
    like = dict(jax.eval_shape(lambda: init(whole, jax.random.key(0))))
    if model.entities:
        both = jax.eval_shape(lambda: init(model, jax.random.key(0)))
        teacher = model_of(_inside(shapes, "prompter."), "salesforce", heads, first)
        full = jax.eval_shape(lambda: init(teacher, jax.random.key(0)))
        like |= {"entity": both["entity"], "prompter": {**full, "entities": both["prompter"]["entities"]}}
    return Plan(layout, like, model)


def _inside(shapes: Mapping[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


__all__ += ["layout_of", "model_of", "prompter_of"]
