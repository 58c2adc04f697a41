"""Converts a ViT of timm to the spatial part of the video encoder.

The conversion holds no temporal parameters (temporal attention, its norm and projection, temporal embeddings). A run initialises
them, see `docs/models/mplug_video.md`, Video encoder.
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

# The file has one bias for q, k and v. The encoder has no key bias: it adds the same value to all logits of a query.
_QKV_BIAS = Rule("blocks.{}.attn.qkv.bias", "(part n h) -> n h", ("blocks/attn/q/bias", None, "blocks/attn/v/bias"))
TIMM = (
    *(rule for rule in mplug_video.TIMESFORMER if not re.search(r"temporal|q_bias|v_bias", rule.source)),
    _QKV_BIAS,
)
LAYOUTS = {"timm": Layout(under("", "vision/", TIMM), drop=(r"head\..*", r"fc_norm\..*", r"pre_logits\..*"))}
__all__ = ["LAYOUTS", "RESIZE", "plan", "spatial_like", "warn_of_heads"]


def spatial_like(model: TimeSformer) -> dict:
    """Parameter tree (ShapeDtypeStructs) of a TimeSformer without its temporal parameters."""
    video = jnp.zeros((1, 1, model.image_size, model.image_size, 3))
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), video))["params"]
    tree = {name: part for name, part in tree.items() if name != "temporal_embed"}
    return tree | {"blocks": {name: part for name, part in tree["blocks"].items() if not name.startswith("temporal")}}


def warn_of_heads(model: TimeSformer, heads: Mapping[str, int]) -> None:
    """Warn if the number of heads differs from that of the image encoder (64 channels a head), unless the user gave it."""
    own = model.width // 64
    if "vision" not in heads and own != model.heads:
        logging.warning(
            "vision: an image encoder of width %d is trained with %d heads, but the conversion has %d, as the published video models "
            "do; to keep %d, give --heads vision=%d here and --config.model.vision.heads=%d in training",
            *(model.width, own, model.heads, own, own, own),
        )


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """Recognise a ViT of timm, plain or in CLIP's form; its parameters go under "vision"."""
    model = mplug_video.timesformer_of(shapes, "", heads)
    warn_of_heads(model, heads)
    return Plan("timm", {"vision": spatial_like(model)}, model)
