"""Converts CLIP's image encoder to the vision tower of the chat model, which has a key bias and quick GELU as CLIP has.

The conversion holds no temporal adapters; a run initialises them. CLIP's norms add 1e-5 to the variance and this tower adds 1e-6, as
the released chat model does, see docs/models/mplug_chat.md, Conversion.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ymplug_jax.convert import clip
from ymplug_jax.convert.plan import Layout, Plan, UnknownModel, heads_of, layers, need
from ymplug_jax.convert.rules import Rule, under
from ymplug_jax.models.clip_vit import ClipViT
from ymplug_jax.models.mplug_chat import RESIZE

_HF, _OPENAI = "vision_model.encoder.layers.{}", "visual.transformer.resblocks.{}.attn.in_proj_bias"
HUGGING_FACE = (*clip.HUGGING_FACE, Rule(f"{_HF}.self_attn.k_proj.bias", "(n h) -> n h", ("blocks/attn/k/bias",)))
OPENAI = (
    *(rule for rule in clip.OPENAI if rule.source != _OPENAI),
    Rule(_OPENAI, "(part n h) -> n h", tuple(f"blocks/attn/{part}/bias" for part in "qkv")),
)
LAYOUTS = {
    "hugging_face": Layout(under("", "vision/", HUGGING_FACE), drop=clip.LAYOUTS["hugging_face"].drop),
    "openai": Layout(under("", "vision/", OPENAI), drop=clip.LAYOUTS["openai"].drop),
}
HEADS = {768: 12, 1024: 16}  # by width
__all__ = ["LAYOUTS", "RESIZE", "plan"]


def spatial_like(model: ClipViT) -> dict:
    """Parameter tree (ShapeDtypeStructs) of the tower without its adapters."""
    media = jnp.zeros((1, 1, model.image_size, model.image_size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), media))["params"]


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """Recognise a CLIP model with a ViT, or its image encoder alone, in one of two layouts.

    Raises:
      UnknownModel: the tensors are not a CLIP's, or its image encoder is not a ViT.
    """
    layout = "openai" if any(name.startswith("visual.") for name in shapes) else "hugging_face"
    if "visual.layer1.0.conv1.weight" in shapes:
        raise UnknownModel("the image encoder of this CLIP is a ResNet; give a CLIP with ViT-L/14")
    patch, positions, blocks, up = (
        ("visual.conv1.weight", "visual.positional_embedding", r"visual\.transformer\.resblocks\.", "mlp.c_fc")
        if layout == "openai"
        else (
            "vision_model.embeddings.patch_embedding.weight",
            "vision_model.embeddings.position_embedding.weight",
            r"vision_model\.encoder\.layers\.",
            "mlp.fc1",
        )
    )
    width, _, _, size = need(shapes, patch)
    model = ClipViT(
        image_size=round((need(shapes, positions)[0] - 1) ** 0.5) * size,
        patch_size=size,
        depth=layers(shapes, rf"{blocks}(\d+)\."),
        width=width,
        heads=heads_of("vision", width, HEADS, heads),
        mlp=need(shapes, f"{blocks.replace(chr(92), '')}0.{up}.weight")[0],
    )
    return Plan(layout, {"vision": spatial_like(model)}, model)
