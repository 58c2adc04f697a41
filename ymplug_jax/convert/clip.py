"""Converts CLIP's image encoder, of OpenAI's files or the Hugging Face layout, to the spatial part of the video encoder.

The conversion holds no temporal parameters (temporal attention, its norm and projection, temporal embeddings). A run initialises
them, see `docs/models/mplug_video.md`, Video encoder.
"""

from collections.abc import Mapping

from ymplug_jax.convert import mplug_video, vit
from ymplug_jax.convert.plan import Layout, Plan, UnknownModel, heads_of, layers, need
from ymplug_jax.convert.rules import SAME, Rule, heads_out, linear, norm, under
from ymplug_jax.models.mplug_video import RESIZE
from ymplug_jax.models.timesformer import TimeSformer

_PATCH = "d rgb y x -> y x rgb d"
_HF = "vision_model.encoder.layers.{}"
HUGGING_FACE = (
    Rule("vision_model.embeddings.class_embedding", SAME, ("cls",)),
    Rule("vision_model.embeddings.position_embedding.weight", "p d -> p d", ("pos_embed",)),
    Rule("vision_model.embeddings.patch_embedding.weight", _PATCH, ("patch/kernel",)),
    *norm("vision_model.pre_layrnorm", "norm_pre"),
    *norm(f"{_HF}.layer_norm1", "blocks/attn_norm"),
    *(
        Rule(f"{_HF}.self_attn.{part}_proj.weight", "(n h) d -> d n h", (f"blocks/attn/{part}/kernel",))
        for part in "qkv"
    ),
    *(Rule(f"{_HF}.self_attn.{part}_proj.bias", "(n h) -> n h", (f"blocks/attn/{part}/bias",)) for part in "qv"),
    *heads_out(f"{_HF}.self_attn.out_proj", "blocks/attn/o"),
    *norm(f"{_HF}.layer_norm2", "blocks/mlp_norm"),
    *linear(f"{_HF}.mlp.fc1", "blocks/mlp/up"),
    *linear(f"{_HF}.mlp.fc2", "blocks/mlp/down"),
    *norm("vision_model.post_layernorm", "norm"),
)
_OPENAI = "visual.transformer.resblocks.{}"
OPENAI = (
    Rule("visual.class_embedding", SAME, ("cls",)),
    Rule("visual.positional_embedding", "p d -> p d", ("pos_embed",)),
    Rule("visual.conv1.weight", _PATCH, ("patch/kernel",)),
    *norm("visual.ln_pre", "norm_pre"),
    *norm(f"{_OPENAI}.ln_1", "blocks/attn_norm"),
    Rule(f"{_OPENAI}.attn.in_proj_weight", "(part n h) d -> d n h", tuple(f"blocks/attn/{p}/kernel" for p in "qkv")),
    Rule(
        f"{_OPENAI}.attn.in_proj_bias", "(part n h) -> n h", ("blocks/attn/q/bias", None, "blocks/attn/v/bias")
    ),  # no key bias: it adds the same value to all logits of a query, which softmax cancels
    *heads_out(f"{_OPENAI}.attn.out_proj", "blocks/attn/o"),
    *norm(f"{_OPENAI}.ln_2", "blocks/mlp_norm"),
    *linear(f"{_OPENAI}.mlp.c_fc", "blocks/mlp/up"),
    *linear(f"{_OPENAI}.mlp.c_proj", "blocks/mlp/down"),
    *norm("visual.ln_post", "norm"),
)
LAYOUTS = {
    "hugging_face": Layout(
        under("", "vision/", HUGGING_FACE),
        drop=(
            r"(vision_model\.embeddings|text_model\.embeddings)\.position_ids",
            r"text_model\..*",
            r"(visual|text)_projection\.weight",
            r"logit_scale",
        ),
        zeros=((f"{_HF}.self_attn.k_proj.bias", f"{_HF}.self_attn.q_proj.bias"),),
    ),
    "openai": Layout(
        under("", "vision/", OPENAI),
        drop=(
            r"visual\.proj",
            r"(positional_embedding|text_projection|logit_scale|input_resolution|context_length|vocab_size)",
            r"(token_embedding|ln_final|transformer)\..*",
        ),
    ),
}
__all__ = ["LAYOUTS", "RESIZE", "plan"]


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """Recognise a CLIP model, or its image encoder alone, in one of two layouts.

    Raises:
      UnknownModel: the tensors are not a CLIP's, or its image encoder is not a ViT.
    """
    layout = "openai" if any(name.startswith("visual.") for name in shapes) else "hugging_face"
    if layout == "openai":
        if "visual.layer1.0.conv1.weight" in shapes:
            raise UnknownModel("the image encoder of this CLIP is a ResNet; give a CLIP with ViT-B/16 or ViT-L/14")
        patch, positions = "visual.conv1.weight", "visual.positional_embedding"
        blocks, up = r"visual\.transformer\.resblocks\.(\d+)\.", "visual.transformer.resblocks.0.mlp.c_fc.weight"
    else:
        patch = "vision_model.embeddings.patch_embedding.weight"
        positions = "vision_model.embeddings.position_embedding.weight"
        blocks, up = r"vision_model\.encoder\.layers\.(\d+)\.", "vision_model.encoder.layers.0.mlp.fc1.weight"
    width, _, _, size = need(shapes, patch)
    model = TimeSformer(
        image_size=round((need(shapes, positions)[0] - 1) ** 0.5) * size,
        patch_size=size,
        depth=layers(shapes, blocks),
        width=width,
        heads=heads_of("vision", width, mplug_video.VISION_HEADS, heads),
        mlp_ratio=need(shapes, up)[0] / width,
        frames=1,
    )
    vit.warn_of_heads(model, heads)
    return Plan(layout, {"vision": vit.spatial_like(model)}, model)
