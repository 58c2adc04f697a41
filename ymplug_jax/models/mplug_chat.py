"""The chat model of mPLUG-video: CLIP tower with adapters, query abstractor and any decoder (docs/models/mplug_chat.md).

Images and clips may stand anywhere in a text, several in one row. Each takes Q + 1 slots. The host states for every position which
media vector it holds, so one gather places them and all shapes are static.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.core import sharding
from ymplug_jax.core.sharding import AxisRules, constrain
from ymplug_jax.models import clip_vit, language_models, position_tables, query_abstractor
from ymplug_jax.models.clip_vit import ClipViT
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.models.query_abstractor import QueryAbstractor

# What an image tower lacks: a run that starts from one leaves it at its start values.
TEMPORAL = (f"vision/{clip_vit.TEMPORAL}", "abstractor/temporal_.*")
# Conversions of CLIP hold no key bias either: it adds the same value to all logits of a query, which softmax cancels. It starts at zero.
FRESH = (*TEMPORAL, "vision/blocks/attn/k/bias")
_TOWER, _DECODER = r"vision/(?!blocks/temporal/).*", r"llm/(?!blocks/lora/).*"
# Frozen parameters of each partition that a config may name: path regexes, full match. `LORA` says which adapters a decoder needs.
PARTITIONS = {
    "adapters_abstractor": (_TOWER, "llm/.*"),
    "lora": ("vision/.*", "abstractor/.*", _DECODER),
    "adapters_abstractor_lora": (_TOWER, _DECODER),
    "all_linears": (_TOWER, _DECODER),
}
# Linear layers of a block of the decoder that get LoRA adapters in a partition; none: the decoder has no adapters.
LORA = {
    "adapters_abstractor": (),
    "lora": ("attn/[qkv]",),
    "adapters_abstractor_lora": ("attn/[qkv]",),
    "all_linears": ("attn/.*", "mlp/.*"),
}
RESIZE = {"vision/pos_embed": lambda table, shape: position_tables.resize_pos_embed(table, shape[0] - 1)}


def axes_of(model: "MPLUGChat") -> AxisRules:
    """Axis words of the model's parameters by path; those of its language model depend on the kind."""

    return (
        *sharding.under("vision/", clip_vit.AXES),
        *sharding.under("abstractor/", query_abstractor.AXES),
        *sharding.under("llm/", language_models.axes_of(model.llm)),
    )


class MPLUGChat(nn.Module):
    """The whole model. Parameters: {vision, abstractor, llm}. H is the width of the language model, Q + 1 the slots of a medium."""

    vision: ClipViT = ClipViT()  # Vision tower.
    abstractor: QueryAbstractor = QueryAbstractor()  # Visual abstractor.
    llm: LanguageModel = language_models.SIZES["bloomz-7b1"]  # Decoder that reads the text and the slots of the media.

    def encode_media(self, media: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Slots of normalised images (T = 1) or clips: f[M, T, S, S, 3] -> f[M, Q + 1, H]. Randomness: "dropout"."""
        tokens = self.vision(media)  # [M, T, 1 + P, D]
        slots = self.abstractor(tokens, self.llm.width, deterministic=deterministic)
        return constrain(slots, "batch", None, None)

    def embed(self, ids: jax.Array, slots: jax.Array | None, index: jax.Array) -> jax.Array:
        """Embeddings of text with media vectors in their places.

        Args:
          ids: int[B, L]; what stands at a media position is not read.
          slots: f[M, Q + 1, H] of all media of the batch; None: no row has any.
          index: int32[B, L], the row of `slots` seen as [M * (Q + 1), H], or -1 for text.

        Returns:
          f[B, L, H]. A row of `slots` that does not exist is NaN.
        """
        embeds = self.llm.embed(jnp.where(index < 0, ids, 0))  # [B, L, H]
        if slots is None:
            return embeds
        flat = slots.reshape(-1, slots.shape[-1]).astype(embeds.dtype)
        vectors = jnp.take(flat, jnp.maximum(index, 0), axis=0, mode="fill", fill_value=jnp.nan)
        return jnp.where((index < 0)[..., None], embeds, vectors)

    def embed_rows(self, ids: jax.Array, slots: jax.Array | None, index: jax.Array) -> jax.Array:
        """`embed` where every row has media of its own, so that no vector leaves the device of its row.

        Args:
          ids: int[B, L]; what stands at a media position is not read.
          slots: f[B, K, H], the vectors of each row; None: no row has any.
          index: int32[B, L], a row of `slots` of the same b, or -1 for text.

        Returns:
          f[B, L, H]. A row of `slots` that does not exist is NaN.
        """
        embeds = self.llm.embed(jnp.where(index < 0, ids, 0))  # [B, L, H]
        if slots is None:
            return embeds
        at = jnp.maximum(index, 0)[..., None]  # [B, L, 1]
        vectors = jnp.take_along_axis(slots.astype(embeds.dtype), at, axis=1, mode="fill", fill_value=jnp.nan)
        return constrain(jnp.where((index < 0)[..., None], embeds, vectors), "batch", None, None)

    def hidden(
        self,
        embeds: jax.Array,
        mask: jax.Array | None = None,
        *,
        segments: jax.Array | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Hidden states after the final norm, f[B, L, H] -> f[B, L, H].

        Args:
          embeds: f[B, L, H].
          mask: int or bool[B, L], 1 where there is a token. None: no padding.
          segments: int[B, L], texts packed into one row, 0 at padding; see `LanguageModel`.
          deterministic: False applies dropout.
        """
        hidden = self.llm(embeds, mask, segments=segments, deterministic=deterministic)
        return constrain(hidden, "batch", None, None)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f[..., H] -> f32[..., V]; pass only the positions that predict an answer."""
        return self.llm.logits(hidden)

    def __call__(self, media: jax.Array, ids: jax.Array, index: jax.Array) -> dict[str, jax.Array]:
        """Every part once; what `init` traces."""
        slots = self.encode_media(media)
        hidden = self.hidden(self.embed(ids, slots, index))
        return {"slots": slots, "hidden": hidden, "logits": self.logits(hidden)}


def init(model: MPLUGChat, key: jax.Array) -> dict:
    """Fresh float32 parameters. Run it under `jax.jit` or `jax.eval_shape`: no forward pass remains."""
    size = model.vision.image_size
    ids = jnp.zeros((1, 2), jnp.int32)
    return model.init(key, jnp.zeros((1, 2, size, size, 3)), ids, ids - 1)["params"]
