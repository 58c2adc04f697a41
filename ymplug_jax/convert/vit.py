"""ViT of timm as the spatial part of the video encoder.

What is temporal (attention over time, its norm and projection, the table of times) is new and stays at its start values.
"""

import logging
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ymplug_jax.convert import mplug_video
from ymplug_jax.convert.plan import Layout, Plan
from ymplug_jax.convert.rules import Rule, under
from ymplug_jax.models.mplug_video import RESIZE
from ymplug_jax.models.timesformer import TimeSformer

# The encoder has no key bias, which would shift all logits of a query alike; the file has one bias for q, k and v.
_QKV_BIAS = Rule("blocks.{}.attn.qkv.bias", "(part n h) -> n h", ("blocks/attn/q/bias", None, "blocks/attn/v/bias"))
TIMM = (
    *(rule for rule in mplug_video.TIMESFORMER if not re.search(r"temporal|q_bias|v_bias", rule.source)),
    _QKV_BIAS,
)
LAYOUTS = {"timm": Layout(under("", "vision/", TIMM), drop=(r"head\..*", r"fc_norm\..*", r"pre_logits\..*"))}
__all__ = ["LAYOUTS", "RESIZE", "plan", "spatial_like", "warn_of_heads"]


def spatial_like(model: TimeSformer) -> dict:
    """Abstract parameters of a TimeSformer without what is temporal."""
    video = jnp.zeros((1, 1, model.image_size, model.image_size, 3))
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), video))["params"]
    tree = {name: part for name, part in tree.items() if name != "temporal_embed"}
    return tree | {"blocks": {name: part for name, part in tree["blocks"].items() if not name.startswith("temporal")}}


def warn_of_heads(model: TimeSformer, heads: Mapping[str, int]) -> None:
    """Image encoders have heads of 64 channels; say so where this one gets others, unless the user chose them."""
    own = model.width // 64
    if "vision" not in heads and own != model.heads:
        logging.warning(
            "width %d was trained with %d heads and is laid out with %d, as the published video models run it; to keep %d give "
            "--heads vision=%d here and --config.model.vision.heads=%d in training",
            *(model.width, own, model.heads, own, own, own),
        )


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """What the tensors are: a ViT of timm, plain or in CLIP's form, for the vision tower."""
    model = mplug_video.timesformer_of(shapes, "", heads)
    warn_of_heads(model, heads)
    return Plan("timm", {"vision": spatial_like(model)}, model)
