"""Converts the released mPLUG-video checkpoints with GPT-3. The rules of their parts are shared with other converters.

The model is described in `docs/models/mplug_video.md`.
"""

import re
from collections.abc import Mapping

import jax

from ymplug_jax.convert.gpt3 import GPT3, MERGE, llm_of
from ymplug_jax.convert.plan import Layout, Plan, heads_of, layers, need
from ymplug_jax.convert.rules import SAME, Rule, heads_out, linear, norm, under
from ymplug_jax.models.abstractor import Abstractor
from ymplug_jax.models.language_models import SIZES
from ymplug_jax.models.mplug_video import FROZEN, RESIZE, MPLUGVideo, init
from ymplug_jax.models.timesformer import TimeSformer


def _timesformer_attn(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.qkv.weight", "(part n h) d -> d n h", tuple(f"{target}/{p}/kernel" for p in "qkv")),
        Rule(f"{source}.q_bias", "(n h) -> n h", (f"{target}/q/bias",)),
        Rule(f"{source}.v_bias", "(n h) -> n h", (f"{target}/v/bias",)),
        *heads_out(f"{source}.proj", f"{target}/o"),
    )


# The TimeSformer of Youku-mPLUG, used by mPLUG-video and ALPRO.
TIMESFORMER = (
    Rule("cls_token", "1 1 d -> d", ("cls",)),
    Rule("pos_embed", "1 p d -> p d", ("pos_embed",)),
    Rule("temporal_embed", "1 t d -> t d", ("temporal_embed",)),
    Rule("patch_embed.proj.weight", "d rgb y x -> y x rgb d", ("patch/kernel",)),
    Rule("patch_embed.proj.bias", SAME, ("patch/bias",)),
    *norm("norm_pre", "norm_pre"),
    *norm("blocks.{}.temporal_ln", "blocks/temporal_norm"),
    *_timesformer_attn("blocks.{}.temporal_attn", "blocks/temporal_attn"),
    *linear("blocks.{}.temporal_fc", "blocks/temporal_fc"),
    *norm("blocks.{}.norm1", "blocks/attn_norm"),
    *_timesformer_attn("blocks.{}.attn", "blocks/attn"),
    *norm("blocks.{}.norm2", "blocks/mlp_norm"),
    *linear("blocks.{}.mlp.fc1", "blocks/mlp/up"),
    *linear("blocks.{}.mlp.fc2", "blocks/mlp/down"),
    *norm("norm", "norm"),
)

# The abstractor without its queries, which the checkpoints store at the top level.
ABSTRACTOR = (
    *norm("norm1", "query_norm"),
    *norm("normk", "context_norm"),
    *norm("norm2", "mlp_norm"),
    Rule("attn.in_proj_weight", "(part n h) d -> d n h", tuple(f"attn/{p}/kernel" for p in "qkv")),
    Rule("attn.in_proj_bias", "(part n h) -> n h", tuple(f"attn/{p}/bias" for p in "qkv")),
    Rule("attn.bias_k", "1 1 (n h) -> n h", ("extra_key",)),
    Rule("attn.bias_v", "1 1 (n h) -> n h", ("extra_value",)),
    *heads_out("attn.out_proj", "attn/o"),
    *linear("mlp.fc1", "mlp/up"),
    *linear("mlp.fc2", "mlp/down"),
)
QUERIES = "1 q d -> q d"

MPLUG_VIDEO = (
    Rule("learnable_queries", QUERIES, ("abstractor/queries",)),
    *under("visual_encoder.", "vision/", TIMESFORMER),
    *under("attn_pool.", "abstractor/", ABSTRACTOR),
    *linear("visual_fc", "connector/proj"),
    *norm("visual_norm", "connector/norm"),
    *under("text_decoder.dist_model.", "llm/", GPT3),
    *linear("vision_proj", "vision_proj"),
    *linear("text_proj", "text_proj"),
    Rule("temp", "->", ("temperature",)),
    *linear("cls_head.0", "head/hidden"),
    *linear("cls_head.2", "head/out"),
)

VISION_HEADS = {768: 8, 1024: 16}  # by width; the released models run ViT-B/16 with 8 heads
LLM = "text_decoder.dist_model.language_model"
LAYOUTS = {"youku": Layout(MPLUG_VIDEO)}
__all__ = ["FROZEN", "LAYOUTS", "MERGE", "RESIZE", "plan"]


def timesformer_of(shapes: Mapping[str, tuple[int, ...]], prefix: str, heads: Mapping[str, int]) -> TimeSformer:
    """The TimeSformer module for the tensors whose names begin with `prefix`.

    Raises:
      UnknownModel: there are no such tensors.
    """
    patch, width = need(shapes, f"{prefix}patch_embed.proj.weight"), need(shapes, f"{prefix}cls_token")[-1]
    return TimeSformer(
        image_size=round((need(shapes, f"{prefix}pos_embed")[1] - 1) ** 0.5) * patch[2],
        patch_size=patch[2],
        depth=layers(shapes, re.escape(prefix) + r"blocks\.(\d+)\."),
        width=width,
        heads=heads_of("vision", width, VISION_HEADS, heads),
        mlp_ratio=need(shapes, f"{prefix}blocks.0.mlp.fc1.weight")[0] / width,
        frames=shapes.get(f"{prefix}temporal_embed", (1, 1))[1],
        clip=f"{prefix}norm_pre.weight" in shapes,
    )


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """Recognise an mPLUG-video of any size, with the heads of any task, with or without its language model."""
    vision = timesformer_of(shapes, "visual_encoder.", heads)
    need(shapes, "visual_encoder.temporal_embed")
    queries, llm_width = need(shapes, "learnable_queries")[1], need(shapes, "visual_fc.weight")[0]
    spoken = f"{LLM}.embedding.word_embeddings.weight" in shapes
    absent = SIZES["1.3b"].clone(vocab=8, width=llm_width, depth=1, heads=1, max_positions=queries + 2)
    model = MPLUGVideo(
        vision=vision,
        abstractor=Abstractor(
            queries=queries, heads=vision.heads, mlp_ratio=need(shapes, "attn_pool.mlp.fc1.weight")[0] / vision.width
        ),
        llm=llm_of(shapes, LLM, heads) if spoken else absent,
        contrastive_width=shapes["vision_proj.weight"][0] if "vision_proj.weight" in shapes else 0,
        classes=shapes["cls_head.2.weight"][0] if "cls_head.2.weight" in shapes else 0,
        connector_norm="visual_norm.weight" in shapes,
    )
    like = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    return Plan("youku", {name: part for name, part in like.items() if spoken or name != "llm"}, model)
