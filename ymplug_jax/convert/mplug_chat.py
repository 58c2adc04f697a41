"""The chat model of mPLUG-video as its release stores it: vision tower, abstractor and BLOOM in one file or several shards."""

from collections.abc import Mapping

import jax

from ymplug_jax.convert import bloom
from ymplug_jax.convert.plan import Layout, Plan, heads_of, layers, need
from ymplug_jax.convert.rules import SAME, Rule, heads_in, heads_out, linear, norm, under
from ymplug_jax.models import mplug_chat
from ymplug_jax.models.clip_vit import ClipViT
from ymplug_jax.models.mplug_chat import RESIZE, MPLUGChat
from ymplug_jax.models.query_abstractor import QueryAbstractor

_BLOCK = "encoder.layers.{}"
_FUSED = f"{_BLOCK}.self_attn.query_key_value"
_TIMES = f"{_BLOCK}.temporal"
VISION = (
    Rule("embeddings.cls_token", "1 1 d -> d", ("cls",)),
    Rule("embeddings.position_embedding", "1 p d -> p d", ("pos_embed",)),
    Rule("embeddings.patch_embed.weight", "d rgb y x -> y x rgb d", ("patch/kernel",)),
    *norm("embeddings.pre_layernorm", "norm_pre"),
    *norm(f"{_TIMES}.ln", "blocks/temporal/norm"),
    Rule(f"{_TIMES}.down_proj.weight", "c d 1 1 1 -> d c", ("blocks/temporal/down/kernel",)),
    Rule(f"{_TIMES}.down_proj.bias", SAME, ("blocks/temporal/down/bias",)),
    Rule(f"{_TIMES}.conv.weight", "c 1 t 1 1 -> t c", ("blocks/temporal/conv/kernel",)),
    Rule(f"{_TIMES}.conv.bias", SAME, ("blocks/temporal/conv/bias",)),
    Rule(f"{_TIMES}.up_proj.weight", "d c 1 1 1 -> c d", ("blocks/temporal/up/kernel",)),
    Rule(f"{_TIMES}.up_proj.bias", SAME, ("blocks/temporal/up/bias",)),
    *norm(f"{_BLOCK}.input_layernorm", "blocks/attn_norm"),
    Rule(f"{_FUSED}.weight", "(n part h) d -> d n h", tuple(f"blocks/attn/{p}/kernel" for p in "qkv")),
    Rule(f"{_FUSED}.bias", "(n part h) -> n h", tuple(f"blocks/attn/{p}/bias" for p in "qkv")),
    *heads_out(f"{_BLOCK}.self_attn.dense", "blocks/attn/o"),
    *norm(f"{_BLOCK}.post_attention_layernorm", "blocks/mlp_norm"),
    *linear(f"{_BLOCK}.mlp.fc1", "blocks/mlp/up"),
    *linear(f"{_BLOCK}.mlp.fc2", "blocks/mlp/down"),
    *norm("post_layernorm", "norm"),
)
_CROSS = f"{_BLOCK}.crossattention"
_OUTPUT = f"{_CROSS}.output"
_PARTS = (("query", "q"), ("key", "k"), ("value", "v"))
ABSTRACTOR = (
    Rule("vit_eos", "1 1 d -> d", ("end",)),
    *(rule for name, part in _PARTS for rule in heads_in(f"{_CROSS}.attention.{name}", f"blocks/attn/{part}")),
    *heads_out(f"{_OUTPUT}.out_proj", "blocks/attn/o"),
    *norm(f"{_CROSS}.norm1", "blocks/query_norm"),
    *norm(f"{_CROSS}.normk", "blocks/context_norm"),
    *norm(f"{_OUTPUT}.norm2", "blocks/mlp_norm"),
    *linear(f"{_OUTPUT}.mlp.w1", "blocks/mlp/gate"),
    *linear(f"{_OUTPUT}.mlp.w3", "blocks/mlp/up"),
    *linear(f"{_OUTPUT}.mlp.w2", "blocks/mlp/down"),
    *norm(f"{_OUTPUT}.mlp.ffn_ln", "blocks/mlp/norm"),
    *linear("visual_fc", "proj"),
    *linear("temporal_visual_fc", "temporal_proj"),
)
QUERIES = (
    Rule("query_tokens", "1 q d -> q d", ("queries",)),
    Rule("temporal_query_tokens", "1 q d -> q d", ("temporal_queries",)),
)
WHOLE = (
    *under("", "abstractor/", QUERIES),
    *under("vision_model.", "vision/", VISION),
    *under("abstractor.", "abstractor/", ABSTRACTOR),
    *under("language_model.", "llm/", bloom.BLOOM),
)
TIED = tuple((f"language_model.{copy}", f"language_model.{original}") for copy, original in bloom.TIED)
LAYOUTS = {"release": Layout(WHOLE, tied=TIED)}
FROZEN = mplug_chat.PARTITIONS["adapters_abstractor"]
VISION_HEADS = {1024: 16}  # by width
ABSTRACTOR_HEADS = {1024: 16}
# What the image-only model lacks, and what its user is told.
LACKS = (
    r".*temporal.*",
    "this is the image-only model; give the video model, or --allow_missing '.*temporal.*' for a run that starts with fresh temporal parts",
)
# The release was used with four frames and prompts that are tokenised line by line, see `data.conversation.for_answering`.
CHAT = {"whole_lines": True, "frames": 4, "max_tokens": 2048}
__all__ = ["CHAT", "FROZEN", "LAYOUTS", "RESIZE", "plan"]


def model_of(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> MPLUGChat:
    """The chat model of these tensors. The release doubles the cls token in clips, so a converted video model does.

    Raises:
      UnknownModel: they are none, or they do not belong together.
    """
    width, _, _, size = need(shapes, "vision_model.embeddings.patch_embed.weight")
    vision = ClipViT(
        image_size=round((need(shapes, "vision_model.embeddings.position_embedding")[1] - 1) ** 0.5) * size,
        patch_size=size,
        depth=layers(shapes, r"vision_model\.encoder\.layers\.(\d+)\."),
        width=width,
        heads=heads_of("vision", width, VISION_HEADS, heads),
        mlp=need(shapes, "vision_model.encoder.layers.0.mlp.fc1.weight")[0],
        double_cls="vision_model.encoder.layers.0.temporal.ln.weight" in shapes,
    )
    pool = QueryAbstractor(
        queries=need(shapes, "query_tokens")[1],
        depth=layers(shapes, r"abstractor\.encoder\.layers\.(\d+)\."),
        heads=heads_of("abstractor", width, ABSTRACTOR_HEADS, heads),
        mlp=need(shapes, "abstractor.encoder.layers.0.crossattention.output.mlp.w1.weight")[0],
    )
    inner = {name.removeprefix("language_model."): shape for name, shape in shapes.items()}
    return MPLUGChat(vision, pool, bloom.bloom_of(inner, heads))


def like_of(model: MPLUGChat) -> dict:
    """Abstract parameters."""
    return jax.eval_shape(lambda: mplug_chat.init(model, jax.random.key(0)))


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """What the tensors are: a whole chat model with adapters and BLOOM.

    Raises:
      UnknownModel: they are not.
    """
    model = model_of(shapes, heads)
    return Plan("release", like_of(model), model)
