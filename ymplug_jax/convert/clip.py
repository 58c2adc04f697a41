"""Image towers as the spatial part of the video encoder: CLIP by OpenAI, CLIP in the Hugging Face layout, ViT of timm.

What is temporal (attention over time, its norm and projection, the table of times) is new and stays at its start values.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ymplug_jax.convert import mplug_video, rules
from ymplug_jax.convert.plan import Plan, UnknownModel, heads_of, layers, need
from ymplug_jax.convert.rules import Rule
from ymplug_jax.models.timesformer import TimeSformer

TEMPORAL = r"temporal_embed|blocks/temporal_.*"
SAME = "d -> d"


def _linear(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", "out in -> in out", (f"{target}/kernel",)),
        Rule(f"{source}.bias", SAME, (f"{target}/bias",)),
    )


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", SAME, (f"{target}/scale",)), Rule(f"{source}.bias", SAME, (f"{target}/bias",))


def _out(source: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", "d (n h) -> n h d", ("blocks/attn/o/kernel",)),
        Rule(f"{source}.bias", SAME, ("blocks/attn/o/bias",)),
    )


_HF = "vision_model.encoder.layers.{}"
HUGGING_FACE = (
    Rule("vision_model.embeddings.class_embedding", SAME, ("cls",)),
    Rule("vision_model.embeddings.position_embedding.weight", "p d -> p d", ("pos_embed",)),
    Rule("vision_model.embeddings.patch_embedding.weight", "d rgb y x -> y x rgb d", ("patch/kernel",)),
    *_norm("vision_model.pre_layrnorm", "norm_pre"),
    *_norm(f"{_HF}.layer_norm1", "blocks/attn_norm"),
    *(
        Rule(f"{_HF}.self_attn.{part}_proj.weight", "(n h) d -> d n h", (f"blocks/attn/{part}/kernel",))
        for part in "qkv"
    ),
    *(Rule(f"{_HF}.self_attn.{part}_proj.bias", "(n h) -> n h", (f"blocks/attn/{part}/bias",)) for part in "qv"),
    *_out(f"{_HF}.self_attn.out_proj"),
    *_norm(f"{_HF}.layer_norm2", "blocks/mlp_norm"),
    *_linear(f"{_HF}.mlp.fc1", "blocks/mlp/up"),
    *_linear(f"{_HF}.mlp.fc2", "blocks/mlp/down"),
    *_norm("vision_model.post_layernorm", "norm"),
)
TABLE = rules.under("", "vision/", HUGGING_FACE)
# A key bias shifts all logits of a query alike; the text tower and the projections have no place here.
HUGGING_FACE_DROP = (
    r"vision_model\.encoder\.layers\.\d+\.self_attn\.k_proj\.bias",
    r"(vision_model\.embeddings|text_model\.embeddings)\.position_ids",
    r"text_model\..*",
    r"(visual|text)_projection\.weight",
    r"logit_scale",
)


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """What the tensors are: the vision tower of a CLIP model in the Hugging Face layout.

    Raises:
      UnknownModel: they are not.
    """
    if "vision_model.embeddings.class_embedding" not in shapes:
        need(shapes, "vision_model.embeddings.class_embedding")
    patch = need(shapes, "vision_model.embeddings.patch_embedding.weight")
    width = patch[0]
    depth = layers(shapes, r"vision_model\.encoder\.layers\.(\d+)\.")
    if not depth:
        raise UnknownModel("the vision tower has no layers")
    model = TimeSformer(
        image_size=round((need(shapes, "vision_model.embeddings.position_embedding.weight")[0] - 1) ** 0.5) * patch[2],
        patch_size=patch[2],
        depth=depth,
        width=width,
        heads=heads_of("vision", width, mplug_video.VISION_HEADS, heads),
        mlp_ratio=need(shapes, "vision_model.encoder.layers.0.mlp.fc1.weight")[0] / width,
        frames=1,
    )
    video = jnp.zeros((1, 1, model.image_size, model.image_size, 3))
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), video))["params"]
    like = {
        "vision": {
            name: {k: v for k, v in part.items() if not k.startswith("temporal")} if name == "blocks" else part
            for name, part in tree.items()
            if not re.fullmatch(TEMPORAL, name)
        }
    }
    return Plan(TABLE, like, HUGGING_FACE_DROP)
