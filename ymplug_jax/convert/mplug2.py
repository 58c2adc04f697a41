"""Converts mPLUG-2: the released layout (variant "mplug2") and the classes of Youku-mPLUG (variant "mplug_youku").

The files hold tensors without a use: CLIP's text tower, MLPs made for vision, fusion layers below the first one that runs. They are
dropped and listed. The model is described in `docs/models/mplug2.md`.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from ymplug_jax.convert import bert, clip_video
from ymplug_jax.convert.mplug_video import TIMESFORMER, timesformer_of
from ymplug_jax.convert.plan import Layout, Plan, UnknownModel, heads_of, layers, need
from ymplug_jax.convert.rules import SAME, Rule, linear, norm, under
from ymplug_jax.models.bert import Text
from ymplug_jax.models.bert_decoder import Decoder
from ymplug_jax.models.clip_vit import VideoClipViT
from ymplug_jax.models.mplug2 import MPLUG2, RESIZE, init
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.models.universal import Fusion, Universal


class Form(NamedTuple):
    """What a layout depends on: how many layers a file holds, and which of them are in use."""

    variant: str  # of `mplug2.VARIANTS`
    text: int  # layers of the text encoder, universal ones included
    universal: int  # universal layers
    stored: int  # layers of the fusion encoder in the file
    fusion: int  # layers of it that run, the last ones
    stride: int  # every stride-th of these but the first is connected; 0: none
    inner: bool  # whether the names of text and fusion encoder have "bert." inside (in variant "mplug_youku": the fusion encoder's)


KNOWN = {
    "mplug2_large": Form("mplug2", 24, 2, 24, 6, 0, False),
    "mplug2_base": Form("mplug2", 12, 2, 12, 3, 0, False),
    "mplug2_base_stride3": Form("mplug2", 6, 2, 12, 6, 3, False),
    "mplug_youku": Form("mplug_youku", 6, 0, 12, 6, 0, True),
}
TEXT_HEADS = {768: 12, 1024: 16}  # by width
VISION_HEADS = {"mplug2": {768: 12, 1024: 16}, "mplug_youku": {768: 8, 1024: 16}}

EMBEDDINGS = (
    Rule("embeddings.word_embeddings.weight", "v d -> v d", ("token_embed",)),
    Rule("embeddings.position_embeddings.weight", "p d -> p d", ("pos_embed",)),
    Rule("embeddings.token_type_embeddings.weight", "p d -> p d", ("type_embed",)),
    *norm("embeddings.LayerNorm", "embed_norm"),
)
PREDICTIONS = (
    *linear("cls.predictions.transform.dense", "hidden"),
    *norm("cls.predictions.transform.LayerNorm", "norm"),
    Rule("cls.predictions.bias", SAME, ("bias",)),
)
_LAYER = "encoder.layer.{}"
_DECODER = (
    *under("bert.", "", EMBEDDINGS),
    *under("bert.", "", bert.layer("blocks", source=_LAYER, cross=True)),
    *under("", "head/", PREDICTIONS),
)
_HEADS = (
    *linear("visn_fc", "connector/proj"),
    *norm("visn_layer_norm", "connector/norm"),
    *norm("visn_emb_norm", "visual_norm"),
    *linear("vision_proj", "vision_proj"),
    *linear("text_proj", "text_proj"),
    Rule("temp", "->", ("temperature",)),
    *linear("itm_head", "match"),
    *linear("cls_head.0", "head/hidden"),
    *linear("cls_head.2", "head/out"),
)
# Momentum copies and queues, which belong to a run and not to the model; buffers; parts that no published task uses.
_DROP = (
    r"\w+_m\..*",
    r"(image_queue|text_queue|idx_queue|queue_ptr)",
    r".*\.position_ids",
    r"(text|fusion)_encoder\.(bert\.)?pooler\..*",
    r"text_encoder\.cls\..*",
    r"fusion_encoder\.(bert\.)?embeddings\..*",
    r"fusion_encoder\.cls\..*",
    r"(text_encoder|text_decoder)\.(bert\.)?encoder\.layer\.\d+\.(intermediate_vision|output_vision)\..*",
    r"text_decoder\.bert\.encoder\.layer\.\d+\.latents",
)
_DROP_CLIP = (
    r"visual_encoder\.(positional_embedding|text_projection|logit_scale)",
    r"visual_encoder\.(token_embedding|ln_final|transformer)\..*",
    *(rf"visual_encoder\.{path}" for path in clip_video.DROP),
)


def layout(form: Form) -> Layout:
    """The names of a file of this form."""
    plain, start = form.text - form.universal, form.stored - form.fusion
    running = range(form.fusion)
    stride = form.stride or form.fusion + 1
    connected = tuple(start + i for i in running if i and i % stride == 0)
    cross = tuple(start + i for i in running if start + i not in connected)
    text = "text_encoder.bert." if form.inner and form.variant == "mplug2" else "text_encoder."
    fusion = "fusion_encoder.bert." if form.inner else "fusion_encoder."
    vision = clip_video.VISION if form.variant == "mplug2" else TIMESFORMER
    rules = (
        *under("visual_encoder.", "vision/", vision),
        *under(text, "text/", EMBEDDINGS),
        *under(text, "text/", bert.layer("blocks", source=_LAYER)),
        *under(text, "universal/", bert.layer("blocks", source=_LAYER, at=tuple(range(plain, form.text)), cross=True)),
        Rule(f"{text}{_LAYER.format(plain)}.latents", "q d -> q d", ("universal/latents",)),
        *under(fusion, "fusion/", bert.layer("blocks", source=_LAYER, at=cross, cross=True)),
        *under(fusion, "fusion/", bert.layer("connected", source=_LAYER, at=connected)),
        Rule(f"{fusion}embeddings.word_embeddings.weight", "v d -> v d", ("mlm/token_embed",)),
        *under("fusion_encoder.", "mlm/", PREDICTIONS),
        *under("text_decoder.", "decoder/", _DECODER),
        *_HEADS,
    )
    unused = [rf"{re.escape(fusion)}encoder\.layer\.{i}\..*" for i in range(start)]
    unused += [rf"{re.escape(fusion)}encoder\.layer\.{i}\.crossattention\..*" for i in connected]
    tied = tuple(
        (f"{part}.cls.predictions.decoder.{copy}", original)
        for part in ("text_decoder", "fusion_encoder")
        for copy, original in (
            ("weight", f"{part}.bert.embeddings.word_embeddings.weight"),
            ("bias", f"{part}.cls.predictions.bias"),
        )
    )
    return Layout(rules, drop=(*_DROP, *(_DROP_CLIP if form.variant == "mplug2" else ()), *unused), tied=tied)


def name_of(form: Form) -> str:
    """Name of the layout of a form, a key of `LAYOUTS`."""
    known = {form: name for name, form in KNOWN.items()}
    return known.get(form) or ":".join(str(value if isinstance(value, str) else int(value)) for value in form)


def form_named(name: str) -> Form:
    """The form that `name_of` calls so.

    Raises:
      KeyError: the name is none of `name_of`.
    """
    if name in KNOWN:
        return KNOWN[name]
    variant, *numbers = name.split(":")
    if len(numbers) != len(Form._fields) - 1 or not all(number.isdecimal() for number in numbers):
        raise KeyError(name)
    text, universal, stored, fusion, stride, inner = map(int, numbers)
    return Form(variant, text, universal, stored, fusion, stride, bool(inner))


class Layouts(dict[str, Layout]):
    """The layouts of released sizes by name; those of other forms are made when their name is looked up."""

    def __missing__(self, name: str) -> Layout:
        """The layout that `name_of` calls so."""
        return layout(form_named(name))


LAYOUTS = Layouts({name: layout(form) for name, form in KNOWN.items()})
__all__ = ["LAYOUTS", "RESIZE", "plan"]


def form_of(shapes: Mapping[str, tuple[int, ...]], fusion: int | None = None, stride: int | None = None) -> Form:
    """The form of a file.

    Args:
      shapes: tensor name -> shape.
      fusion: layers of the fusion encoder that run, which no shape tells; None: those of a released size.
      stride: see `Form`; None: that of a released size, or 0.

    Raises:
      UnknownModel: the tensors are not an mPLUG-2's, or `fusion` is None and the size is not a released one.
    """
    variant = "mplug_youku" if "visual_encoder.cls_token" in shapes else "mplug2"
    if variant == "mplug2":
        need(shapes, "visual_encoder.visual.class_embedding")
    inner = any(name.startswith("fusion_encoder.bert.") for name in shapes)
    dot = r"text_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\."
    text = layers(shapes, dot)
    universal = len({re.match(dot, name)[1] for name in shapes if re.match(dot + "crossattention", name)})  # type: ignore[index]
    stored = layers(shapes, r"fusion_encoder\.(?:bert\.)?encoder\.layer\.(\d+)\.")
    known = [
        form
        for form in KNOWN.values()
        if (form.variant, form.text, form.universal, form.stored) == (variant, text, universal, stored)
    ]
    if fusion is None and not known:
        raise UnknownModel(
            f"the number of fusion layers in use is unknown for {text} text layers and {stored} fusion layers; give --heads fusion=N"
        )
    if fusion is None:
        fusion, stride = known[0].fusion, known[0].stride if stride is None else stride
    if fusion > stored:
        raise UnknownModel(f"has {stored} fusion layers, so {fusion} cannot be in use; give --heads fusion=N")
    return Form(variant, text, universal, stored, fusion, stride or 0, inner)


def model_of(shapes: Mapping[str, tuple[int, ...]], form: Form, heads: Mapping[str, int]) -> MPLUG2:
    """The module for these tensors, with all parts and heads that they have; `heads` as for `plan.heads_of`.

    Raises:
      UnknownModel: the tensors are not an mPLUG-2's.
    """
    inner = "text_encoder.bert." if form.inner and form.variant == "mplug2" else "text_encoder."
    vocab, width = need(shapes, f"{inner}embeddings.word_embeddings.weight")
    hidden = need(shapes, f"{inner}encoder.layer.0.intermediate.dense.weight")[0]
    count = heads_of("text", width, TEXT_HEADS, heads)
    sizes: dict[str, Any] = {"heads": count, "hidden": hidden, "width": width}

    def rows(prefix: str, table: str) -> int:
        return need(shapes, f"{prefix}embeddings.{table}_embeddings.weight")[0]

    text = Text(
        vocab=vocab, depth=form.text - form.universal, max_positions=rows(inner, "position"),
        types=rows(inner, "token_type"), **sizes,
    )  # fmt: skip
    decoder, generates = Decoder(vocab=vocab, **sizes), "text_decoder.cls.predictions.bias" in shapes
    if generates:
        decoder = Decoder(
            vocab=rows("text_decoder.bert.", "word"),
            depth=layers(shapes, r"text_decoder\.bert\.encoder\.layer\.(\d+)\."),
            max_positions=rows("text_decoder.bert.", "position"),
            types=rows("text_decoder.bert.", "token_type"),
            **sizes,
        )
    latents = shapes.get(f"{inner}encoder.layer.{form.text - form.universal}.latents", (1,))[0]
    matching = "itm_head.weight" in shapes
    return MPLUG2(
        vision=vision_of(shapes, form.variant, heads),
        text=text,
        universal=Universal(depth=form.universal or 1, queries=latents, **sizes),
        fusion=Fusion(depth=form.fusion, stride=form.stride, **sizes),
        decoder=decoder,
        generates=generates,
        contrastive_width=shapes["vision_proj.weight"][0] if "vision_proj.weight" in shapes else 0,
        matching=matching,
        # The classes that fine-tune hold the head of masked words too, but do not use it.
        masked=matching and generates and "fusion_encoder.cls.predictions.bias" in shapes,
        classes=shapes["cls_head.2.weight"][0] if "cls_head.2.weight" in shapes else 0,
        variant=form.variant,
    )


def vision_of(
    shapes: Mapping[str, tuple[int, ...]], variant: str, heads: Mapping[str, int]
) -> VideoClipViT | TimeSformer:
    """The video encoder for these tensors.

    Raises:
      UnknownModel: there are no such tensors.
    """
    prefix = "visual_encoder."
    if variant == "mplug_youku":
        width = need(shapes, f"{prefix}cls_token")[-1]
        return timesformer_of(
            shapes, prefix, {**heads, "vision": heads_of("vision", width, VISION_HEADS[variant], heads)}
        )
    prefix += "visual."
    width, _, taps, side, _ = need(shapes, f"{prefix}conv1.weight")
    blocks = rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\."
    return VideoClipViT(
        image_size=round((need(shapes, f"{prefix}positional_embedding")[0] - 1) ** 0.5) * side,
        patch_size=side,
        depth=layers(shapes, blocks),
        width=width,
        heads=heads_of("vision", width, VISION_HEADS[variant], heads),
        mlp=need(shapes, f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0],
        adapters=1 + any(re.match(blocks + r"lmhra2\.", name) is not None for name in shapes),
        temporal_stride=2 if taps > 1 else 0,  # no tensor tells the stride; this is the class's default
    )


def plan(
    shapes: Mapping[str, tuple[int, ...]],
    heads: Mapping[str, int],
    fusion: int | None = None,
    stride: int | None = None,
) -> Plan:
    """Recognise an mPLUG-2 of either variant, with the parts and heads of its task; `fusion` and `stride` as for `form_of`."""
    form = form_of(shapes, fusion or heads.get("fusion"), stride)
    model = model_of(shapes, form, heads)
    return Plan(name_of(form), jax.eval_shape(lambda: init(model, jax.random.key(0))), model)
