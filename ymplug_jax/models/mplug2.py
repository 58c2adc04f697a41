"""mPLUG-2 and the baseline of Youku-mPLUG of the same name: video and text encoders, fusion encoder, decoder and heads.

Xu et al., "mPLUG-2: a modularized multi-modal foundation model across text, image and video", 2023, and Li et al., "mPLUG:
effective and efficient vision-language learning by cross-modal skip-connections", 2022, which the baseline resembles. Described in
docs/models/mplug2.md.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.core import sharding
from ymplug_jax.core.sharding import AxisRules, constrain
from ymplug_jax.models import bert, bert_decoder, clip_vit, layers, mplug_video, temporal, timesformer, universal
from ymplug_jax.models.alpro import Connector, Head
from ymplug_jax.models.bert import MaskedHead, Text
from ymplug_jax.models.bert_decoder import Decoder
from ymplug_jax.models.clip_vit import VideoClipViT
from ymplug_jax.models.language_model import Memory
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.models.universal import Fusion, Universal

VARIANTS = ("mplug2", "mplug_youku")
TEMPERATURE = (0.001, 0.5)  # bounds of the learned temperature
# What an image tower lacks, by variant: a run that starts from one leaves it at its start values.
TEMPORAL: Mapping[str, tuple[str, ...]] = {
    "mplug2": (f"vision/{clip_vit.VIDEO_TEMPORAL}",),
    "mplug_youku": mplug_video.TEMPORAL,
}
# Tables that are resized if a checkpoint has another resolution or number of frames, and patches that reach over more frames.
RESIZE = {**mplug_video.RESIZE, "vision/patch/kernel": temporal.resize_patch}


_PARTS = (
    *sharding.under("text/", bert.TEXT_AXES),
    *sharding.under("universal/", universal.UNIVERSAL_AXES),
    *sharding.under("fusion/", universal.FUSION_AXES),
    *sharding.under("decoder/", bert_decoder.AXES),
    ("mlm/token_embed", "vocab embed"),
    *sharding.under("mlm/", bert.HEAD_AXES),
    ("connector/proj/kernel", "embed embed"),
    ("(connector/(proj/bias|norm/scale|norm/bias)|visual_norm/(scale|bias))", "embed"),
    ("(vision_proj|text_proj)/kernel", "embed proj"),
    ("(vision_proj|text_proj)/bias", "proj"),
    ("temperature", ""),
    ("match/kernel", "embed classes"),
    ("match/bias", "classes"),
    ("head/hidden/kernel", "embed mlp"),
    ("head/hidden/bias", "mlp"),
    ("head/out/kernel", "mlp classes"),
    ("head/out/bias", "classes"),
)


def axes_of(model: "MPLUG2") -> AxisRules:
    """Axis words of the model's parameters by path; those of its video encoder depend on the variant."""
    vision = clip_vit.VIDEO_AXES if isinstance(model.vision, VideoClipViT) else timesformer.AXES
    return (*sharding.under("vision/", vision), *_PARTS)


class WordHead(nn.Module):
    """Masked-word head with a table of word embeddings of its own."""

    vocab: int  # Number of rows of the table V.
    width: int  # Width of the states C.
    ln_eps: float  # Epsilon of the LayerNorm.
    dtype: str  # Type of the computation; logits are float32.

    def setup(self) -> None:
        """Create the table and the head, whose parameters stand beside it."""
        self.token_embed = self.param("token_embed", nn.initializers.normal(bert.STD), (self.vocab, self.width))
        self.head = MaskedHead(self.ln_eps, self.dtype)
        nn.share_scope(self, self.head)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of the vocabulary, f[..., C] -> f32[..., V]."""
        return self.head(x, self.token_embed)


class MPLUG2(nn.Module):
    """Both variants, with the parts and heads that the fields ask for.

    Parameters: {vision}; {connector} if the vision width D differs from the text width C; {universal, visual_norm} in variant
    "mplug2"; {text, fusion} with `reads`; {decoder} with `generates`; {vision_proj, text_proj, temperature} with
    `contrastive_width`; {match} with `matching`; {mlm} with `masked`; {head} with `classes`.
    """

    # Video encoder: CLIP with temporal modules in variant "mplug2", TimeSformer in "mplug_youku".
    vision: VideoClipViT | TimeSformer = VideoClipViT()
    text: Text = Text(depth=10)  # Text encoder, without the universal layers that follow it in variant "mplug2".
    universal: Universal = Universal()  # Last layers of the text encoder in variant "mplug2", which read video too.
    fusion: Fusion = Fusion(depth=3)  # Fusion encoder, in which the text reads the video.
    decoder: Decoder = Decoder()  # Decoder that generates text.
    reads: bool = True  # Adds text encoder and fusion encoder; captioning needs neither.
    generates: bool = True  # Adds the decoder.
    contrastive_width: int = 0  # Width E of the contrastive heads; 0 leaves them out.
    matching: bool = False  # Adds the head that classifies pairs into matching and not matching.
    masked: bool = False  # Adds the head that predicts masked words from the fusion encoder's text.
    classes: int = 0  # Number of classes of the classifier; 0 leaves it out.
    variant: str = "mplug2"  # "mplug2", as released, or "mplug_youku", the baseline in the Youku-mPLUG repository.

    def setup(self) -> None:
        """Create connector, norm and heads that the fields ask for; the encoders and the decoder are fields."""
        if self.variant not in VARIANTS:
            raise ValueError(
                f"config.model.variant: unknown variant {self.variant!r}; choose one of {', '.join(VARIANTS)}"
            )
        if not self.reads and (self.contrastive_width or self.matching or self.masked or self.classes):
            raise ValueError("config.model.reads: heads that read a text need the text encoder; set it to True")
        width, dtype, ln_eps = self.decoder.width, self.decoder.dtype, self.decoder.ln_eps

        def linear(size: int) -> nn.Dense:
            init = layers.torch_linear(width)
            return nn.Dense(size, kernel_init=init, bias_init=init, dtype=jnp.dtype(dtype))

        self.drop = nn.Dropout(self.decoder.dropout)
        if self.vision.width != width:
            self.connector = Connector(width, ln_eps, self.decoder.dropout, dtype)
        if self.variant == "mplug2":
            self.visual_norm = layers.norm(None, ln_eps, dtype)
        if self.contrastive_width:
            self.vision_proj, self.text_proj = (linear(self.contrastive_width) for _ in range(2))
            self.temperature = self.param("temperature", nn.initializers.constant(0.07), ())
        if self.matching:
            self.match = linear(2)
        if self.masked:
            self.mlm = WordHead(self.text.vocab, width, ln_eps, dtype)
        if self.classes:
            self.head = Head(width, self.classes, dtype)

    def encode_video(self, video: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Encode a normalised video, f[B, T, S, S, 3] -> f[B, 1 + T' * P, C]: cls, then the patches frame by frame.

        T' is T, or fewer with temporal downsampling. `deterministic` False applies dropout (random stream "dropout").
        """
        if isinstance(self.vision, TimeSformer):
            tokens = self.vision(video, deterministic=deterministic)  # [B, 1 + T * P, D]
        else:
            tokens = self.vision(video)
        if self.vision.width != self.decoder.width:
            tokens = self.connector(tokens, deterministic)  # [B, 1 + T' * P, C]
        tokens = constrain(tokens, "batch", None, None)
        if self.variant == "mplug2":
            more = self.universal.read_video(tokens, deterministic=deterministic)
            tokens = self.drop(self.visual_norm(tokens + more), deterministic=deterministic)
        return constrain(tokens, "batch", None, None)

    def encode_text(self, ids: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Encode a text: ids int[B, L] and mask int or bool[B, L] (1 at tokens) -> f[B, L, C]."""
        states = self.text(ids, mask, deterministic=deterministic)
        if self.variant == "mplug2":
            states = self.universal.read_text(states, mask, deterministic=deterministic)
        return constrain(states, "batch", None, None)

    def fuse(
        self, states: jax.Array, mask: jax.Array, tokens: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Read text and video together.

        Args:
          states: f[B, L, C] of `encode_text`.
          mask: int or bool[B, L].
          tokens: f[B, M, C] of `encode_video`, all visible. M 0: the text alone.
          deterministic: False applies dropout, which needs the random stream "dropout".

        Returns:
          The video f[B, M, C], which only connected layers change, and the text f[B, L, C].
        """
        tokens, fused = self.fusion(states, mask, tokens, deterministic=deterministic)
        return constrain(tokens, "batch", None, None), constrain(fused, "batch", None, None)

    def decode(
        self, ids: jax.Array, mask: jax.Array | None, memory: Memory, *, deterministic: bool = True
    ) -> jax.Array:
        """States of the decoder, of which position i predicts token i + 1.

        Args:
          ids: int[B, L], padded on the right.
          mask: int or bool[B, L], 1 at tokens; None: no padding.
          memory: what the decoder reads: `encode_video`'s tokens, or those of `memory_of`.
          deterministic: False applies dropout, which needs the random stream "dropout".

        Returns:
          f[B, L, C].
        """
        embeds = self.decoder.embed(ids)
        states = self.decoder(embeds, mask, memory=memory, deterministic=deterministic)
        return constrain(states, "batch", None, None)

    def logits(self, states: jax.Array) -> jax.Array:
        """Logits of the decoder's vocabulary: f[..., C] of `decode` -> f32[..., V]. Select the needed positions first."""
        return self.decoder.logits(states)

    def embed_video(self, tokens: jax.Array) -> jax.Array:
        """Unit vector of a video: f[B, M, C] of `encode_video` -> f32[B, E]."""
        return layers.unit(self.vision_proj(tokens[:, 0]))

    def embed_text(self, states: jax.Array) -> jax.Array:
        """Unit vector of a text: f[B, L, C] of `encode_text` -> f32[B, E]."""
        return layers.unit(self.text_proj(states[:, 0]))

    def match_logits(self, fused: jax.Array) -> jax.Array:
        """Logits of the matching head: text f[..., L, C] of `fuse` -> f32[..., 2]; class 1 means that the pair matches."""
        return self.match(fused[..., 0, :]).astype(jnp.float32)

    def words(self, fused: jax.Array) -> jax.Array:
        """Logits of masked words at positions of the text of `fuse`: f[..., C] -> f32[..., V]."""
        return self.mlm(fused)

    def classify(self, fused: jax.Array) -> jax.Array:
        """Logits of the classifier: text f[..., L, C] of `fuse` -> f32[..., K]."""
        return self.head(fused[..., 0, :])

    def __call__(self, video: jax.Array, ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """Run every part once, for `init`. Tasks call the methods they need."""
        tokens = self.encode_video(video)
        out = {"tokens": tokens}
        if self.reads:
            states = self.encode_text(ids, mask)
            _, fused = self.fuse(states, mask, tokens)
            out |= {"states": states, "fused": fused}
            if self.contrastive_width:
                out |= {"video": self.embed_video(tokens), "text": self.embed_text(states)}
            if self.matching:
                out["match"] = self.match_logits(fused)
            if self.masked:
                out["words"] = self.words(fused)
            if self.classes:
                out["classes"] = self.classify(fused)
        if self.generates:
            out["logits"] = self.logits(self.decode(ids, mask, Memory(tokens)))
        return out


def memory_of(tokens: jax.Array, fused: jax.Array, mask: jax.Array) -> Memory:
    """Memory of a decoder that reads video and text: f[B, M, C], f[B, L, C] of `fuse`, int or bool[B, L] -> f[B, M + L, C]."""
    seen = jnp.concatenate([jnp.ones(tokens.shape[:2], bool), mask.astype(bool)], axis=1)
    return Memory(jnp.concatenate([tokens, fused], axis=1), seen)


def init(model: MPLUG2, key: jax.Array) -> dict:
    """Initial float32 parameters. Call it under `jax.jit` or `jax.eval_shape`, which remove the forward pass."""
    vision = model.vision
    frames = vision.frames if isinstance(vision, TimeSformer) else 1
    video = jnp.zeros((1, frames, vision.image_size, vision.image_size, 3))
    ids = jnp.zeros((1, 2), jnp.int32)
    return model.init(key, video, ids, jnp.ones_like(ids))["params"]


VISIONS: Mapping[str, VideoClipViT | TimeSformer] = {
    **clip_vit.VIDEO_SIZES,
    "youku-b16": TimeSformer(),
    "youku-l14": TimeSformer(patch_size=14, depth=24, width=1024, heads=16),
    "youku-tiny": TimeSformer(image_size=64, patch_size=16, depth=2, width=64, heads=4),
}
_LARGE: dict[str, Any] = {"width": 1024, "heads": 16, "hidden": 4096}
_TINY: dict[str, Any] = {"width": 64, "heads": 4, "hidden": 128}
# Text encoder without universal layers, universal layers, fusion encoder and decoder.
TEXTS: Mapping[str, tuple[Text, Universal, Fusion, Decoder]] = {
    "base": (Text(depth=10), Universal(), Fusion(depth=3), Decoder()),
    "base-stride3": (Text(depth=4), Universal(), Fusion(depth=6, stride=3), Decoder()),
    "large": (Text(depth=22, **_LARGE), Universal(**_LARGE), Fusion(depth=6, **_LARGE), Decoder(**_LARGE)),
    "youku": (Text(depth=6), Universal(), Fusion(depth=6), Decoder()),
    "tiny": (
        Text(vocab=512, depth=2, max_positions=64, **_TINY),
        Universal(queries=8, **_TINY),
        Fusion(depth=2, **_TINY),
        bert_decoder.SIZES["tiny"],
    ),
}
# Named sizes: variant, video encoder, text side.
SIZES = {
    "base": ("mplug2", "b16", "base"),
    "base-stride3": ("mplug2", "b16", "base-stride3"),
    "large": ("mplug2", "l14", "large"),
    "tiny": ("mplug2", "tiny", "tiny"),
    "youku-b16": ("mplug_youku", "youku-b16", "youku"),
    "youku-l14": ("mplug_youku", "youku-l14", "youku"),
    "youku-tiny": ("mplug_youku", "youku-tiny", "tiny"),
}
ENGLISH = 30522  # words of the released models; the Chinese ones have 21,128


def sized(size: str = "large", *, vocab: int = 0, frames: int = 0, **parts: Any) -> MPLUG2:
    """A model of a named size.

    Args:
      size: one of `SIZES`.
      vocab: words of text encoder and decoder; 0: those of Chinese BERT, or of the tiny sizes.
      frames: T of variant "mplug_youku", whose table of times has as many rows; 0: 4. The other variant takes any number.
      parts: fields of `MPLUG2` that say which parts and heads there are.

    Raises:
      ValueError: the size is unknown.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; choose one of {', '.join(SIZES)}")
    variant, tower, words = SIZES[size]
    vision, (text, shared, fusion, decoder) = VISIONS[tower], TEXTS[words]
    if frames and isinstance(vision, TimeSformer):
        vision = vision.clone(frames=frames)
    if vocab:
        text, decoder = text.clone(vocab=vocab), decoder.clone(vocab=vocab)
    return MPLUG2(vision=vision, text=text, universal=shared, fusion=fusion, decoder=decoder, variant=variant, **parts)
