"""ALPRO: TimeSformer, a text encoder, and a fusion encoder over [text ; video]; contrastive, matching and masked-word heads.

Li et al., "Align and prompt: video-and-language pre-training with entity prompts", 2021, and the form it has in
Youku-mPLUG. Described in docs/models/alpro.md.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.core import sharding
from ymplug_jax.core.sharding import constrain
from ymplug_jax.models import bert, layers, mplug_video, timesformer
from ymplug_jax.models.bert import Fusion, MaskedHead, Text
from ymplug_jax.models.timesformer import TimeSformer

TEACHER = ("prompter/.*",)  # path regexes (full match) of the frozen teacher, present when entities are predicted
TEMPORAL = mplug_video.TEMPORAL
# Tables that are resized if a checkpoint has another resolution or number of frames, the teacher's included.
RESIZE = {prefix + path: resize for path, resize in mplug_video.RESIZE.items() for prefix in ("", "prompter/")}
TEMPERATURE = (0.001, 0.5)  # bounds of the learned temperature
VARIANTS = ("youku", "salesforce")


_PARTS = (
    *sharding.under("vision/", timesformer.AXES),
    *sharding.under("text/", bert.TEXT_AXES),
    *sharding.under("fusion/", bert.FUSION_AXES),
    *sharding.under("mlm/", bert.HEAD_AXES),
    ("connector/proj/kernel", "embed embed"),
    ("connector/(proj/bias|norm/scale|norm/bias)", "embed"),
    ("(vision_proj|text_proj)/kernel", "embed proj"),
    ("(vision_proj|text_proj)/bias", "proj"),
    ("temperature", ""),
    ("match/kernel", "embed classes"),
    ("match/bias", "classes"),
    ("(head|entity)/hidden/kernel", "embed mlp"),
    ("(head|entity)/hidden/bias", "mlp"),
    ("(head|entity)/out/kernel", "mlp classes"),
    ("(head|entity)/out/bias", "classes"),
)
AXES = (*_PARTS, *sharding.under("prompter/", _PARTS), ("prompter/(image_)?entities", "classes proj"))


class Connector(nn.Module):
    """Linear projection from the vision width D to the text width C, LayerNorm and dropout."""

    width: int  # Width of the output C.
    ln_eps: float  # Epsilon of the LayerNorm.
    dropout: float  # Dropout rate of the output in training.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        """Project tokens, f[B, S, D] -> f[B, S, C]; `deterministic` False applies dropout."""
        init = layers.torch_linear(x.shape[-1])
        dense = nn.Dense(self.width, kernel_init=init, bias_init=init, dtype=jnp.dtype(self.dtype), name="proj")
        x = layers.norm("norm", self.ln_eps, self.dtype)(dense(x))
        return nn.Dropout(self.dropout, deterministic=deterministic)(x)


class Head(nn.Module):
    """Classifier: linear, ReLU, linear."""

    hidden: int  # Width between the two linear layers.
    classes: int  # Number of classes K.
    dtype: str  # Type of the computation; logits are float32.

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of the classes, f[..., C] -> f32[..., K]."""

        def dense(width: int, fan_in: int, name: str) -> nn.Dense:
            init = layers.torch_linear(fan_in)
            return nn.Dense(width, kernel_init=init, bias_init=init, dtype=jnp.dtype(self.dtype), name=name)

        x = nn.relu(dense(self.hidden, x.shape[-1], "hidden")(x))
        return dense(self.classes, self.hidden, "out")(x).astype(jnp.float32)


class ALPRO(nn.Module):
    """ALPRO with the heads that its fields ask for.

    Parameters: {vision, text, fusion}; {vision_proj, text_proj, temperature} with `contrastive_width`; {match} with
    `matching`; {mlm} with `masked`; {head} with `classes`; {entity} with `entities`; {connector} if the vision width D
    differs from the text width C. The teacher of entities is a second model whose parameters stand under "prompter", see
    `prompter_of`.
    """

    vision: TimeSformer = TimeSformer(clip=False)  # Video encoder.
    text: Text = Text()  # Text encoder, the lower layers of a BERT.
    fusion: Fusion = Fusion()  # Fusion encoder over text and video, the upper layers of a BERT.
    contrastive_width: int = 256  # Width E of the contrastive heads; 0 leaves them out.
    matching: bool = True  # Adds the head that classifies pairs into matching and not matching.
    masked: bool = True  # Adds the head that predicts masked words.
    classes: int = 0  # Number of classes or answers of the classifier; 0 leaves it out.
    entities: int = 0  # Number of entities that the entity head predicts; 0 leaves out the head and the teacher.
    stills: bool = False  # Adds a second table of entities to the teacher, for batches of still images.
    variant: str = "youku"  # "youku", or "salesforce": texts end with [SEP] and the classifier is twice as wide.

    def setup(self) -> None:
        """Create the connector and the heads that the fields ask for; the encoders are fields."""
        if self.variant not in VARIANTS:
            raise ValueError(
                f"config.model.variant: unknown variant {self.variant!r}; choose one of {', '.join(VARIANTS)}"
            )
        width, dtype = self.text.width, self.text.dtype

        def linear(size: int, fan_in: int) -> nn.Dense:
            init = layers.torch_linear(fan_in)
            return nn.Dense(size, kernel_init=init, bias_init=init, dtype=jnp.dtype(dtype))

        if self.vision.width != width:
            self.connector = Connector(width, self.text.ln_eps, self.text.dropout, dtype)
        if self.contrastive_width:
            self.vision_proj, self.text_proj = (linear(self.contrastive_width, width) for _ in range(2))
            self.temperature = self.param("temperature", nn.initializers.constant(0.07), ())
        if self.matching:
            self.match = linear(2, width)
        if self.masked:
            self.mlm = MaskedHead(self.text.ln_eps, dtype)
        if self.classes:
            self.head = Head(width if self.variant == "youku" else 2 * width, self.classes, dtype)
        if self.entities:
            self.entity = Head(2 * width, self.entities, dtype)

    def encode_video(self, video: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Encode a normalised video, f[B, T, S, S, 3] -> f[B, 1 + P, C]: cls, then each patch averaged over the frames."""
        tokens = self.vision(video, deterministic=deterministic)  # [B, 1 + T * P, D]
        b, _, d = tokens.shape
        patches = tokens[:, 1:].reshape(b, self.vision.frames, -1, d).mean(axis=1)  # [B, P, D]
        tokens = jnp.concatenate([tokens[:, :1], patches], axis=1)  # [B, 1 + P, D]
        if self.vision.width != self.text.width:
            tokens = self.connector(tokens, deterministic)  # [B, 1 + P, C]
        return constrain(tokens, "batch", None, None)

    def encode_text(self, ids: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Encode a text: ids int[B, L] and mask int or bool[B, L] (1 at tokens) -> f[B, L, C]."""
        return constrain(self.text(ids, mask, deterministic=deterministic), "batch", None, None)

    def fuse(
        self, states: jax.Array, mask: jax.Array, tokens: jax.Array | None, *, deterministic: bool = True
    ) -> jax.Array:
        """Read text and video together.

        Args:
          states: f[B, L, C] of `encode_text`.
          mask: int or bool[B, L].
          tokens: f[B, 1 + P, C] of `encode_video`, all visible. None reads the text alone.
          deterministic: False applies dropout, which needs the random stream "dropout".

        Returns:
          f[B, L + 1 + P, C], text first.
        """
        if tokens is not None:
            states = jnp.concatenate([states, tokens.astype(states.dtype)], axis=1)  # [B, L + 1 + P, C]
            mask = jnp.concatenate([mask.astype(jnp.int32), jnp.ones(tokens.shape[:2], jnp.int32)], axis=1)
        return constrain(self.fusion(states, mask, deterministic=deterministic), "batch", None, None)

    def embed_video(self, tokens: jax.Array) -> jax.Array:
        """Unit vector of a video: f[B, 1 + P, C] of `encode_video` -> f32[B, E]."""
        return layers.unit(self.vision_proj(tokens[:, 0]))

    def embed_text(self, states: jax.Array) -> jax.Array:
        """Unit vector of a text: f[B, L, C] of `encode_text` -> f32[B, E]."""
        return layers.unit(self.text_proj(states[:, 0]))

    def match_logits(self, fused: jax.Array) -> jax.Array:
        """Logits of the matching head: f[..., S, C] of `fuse` -> f32[..., 2]; class 1 means that the pair matches."""
        return self.match(fused[..., 0, :]).astype(jnp.float32)

    def words(self, states: jax.Array) -> jax.Array:
        """Logits of the vocabulary at text positions: f[..., C] -> f32[..., V]."""
        return self.mlm(states, self.text.token_embed)

    def classify(self, fused: jax.Array) -> jax.Array:
        """Logits of the classifier: f[..., S, C] of `fuse` -> f32[..., K]."""
        return self.head(fused[..., 0, :])

    def entity_logits(self, fused: jax.Array, inside: jax.Array) -> jax.Array:
        """Logits of the entity in a region: f[B, L + 1 + P, C] of `fuse` and the region's patches bool[B, P] -> f32[B, K]."""
        patches = fused[:, -inside.shape[1] :]  # [B, P, C]
        share = inside.astype(jnp.float32)
        share = share / jnp.maximum(share.sum(axis=1, keepdims=True), 1)
        mean = jnp.einsum("bp,bpc->bc", share, patches.astype(jnp.float32))  # [B, C]
        return self.entity(mean.astype(fused.dtype))

    def __call__(self, video: jax.Array, ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """Run every part once, for `init`. Tasks call the methods they need."""
        tokens, states = self.encode_video(video), self.encode_text(ids, mask)
        out = {"tokens": tokens, "states": states}
        if self.contrastive_width:
            out |= {"video": self.embed_video(tokens), "text": self.embed_text(states)}
        if not (self.matching or self.masked or self.classes or self.entities):
            return out
        fused = self.fuse(states, mask, tokens)
        if self.matching:
            out["match"] = self.match_logits(fused)
        if self.masked:
            out["words"] = self.words(fused[:, : ids.shape[1]])
        if self.classes:
            out["classes"] = self.classify(fused)
        if self.entities:
            out["entities"] = self.entity_logits(fused, jnp.ones((len(ids), tokens.shape[1] - 1), bool))
        return out


def prompter_of(model: ALPRO) -> ALPRO:
    """The teacher of a model with entities: two encoders and their contrastive heads, trained by task "alpro_prompter"."""
    return model.clone(matching=False, masked=False, classes=0, entities=0, stills=False)


def init(model: ALPRO, key: jax.Array) -> dict:
    """Initial float32 parameters. Call it under `jax.jit` or `jax.eval_shape`, which remove the forward pass.

    A model with entities also gets the teacher under "prompter", with its table "entities", f32[K, E] of zeros, and with `stills` the
    table "image_entities" as well.
    """
    vision = model.vision
    video = jnp.zeros((1, vision.frames, vision.image_size, vision.image_size, 3))
    ids = jnp.zeros((1, 2), jnp.int32)
    params = model.init(key, video, ids, jnp.ones_like(ids))["params"]
    if model.entities:
        prompter = init(prompter_of(model), jax.random.fold_in(key, 1))
        tables = ("entities", "image_entities") if model.stills else ("entities",)
        shape = (model.entities, model.contrastive_width)
        params["prompter"] = prompter | {name: jnp.zeros(shape) for name in tables}
    return params


VISIONS = {
    "b16": TimeSformer(clip=False),
    "clip_b16": TimeSformer(),
    "clip_l14": TimeSformer(patch_size=14, depth=24, width=1024, heads=16),
    "tiny": TimeSformer(image_size=64, patch_size=16, depth=2, width=64, heads=4, clip=False),
}
TEXTS = {
    "base": (Text(), Fusion()),
    "tiny": (
        Text(vocab=512, width=64, depth=2, heads=4, hidden=128, max_positions=64),
        Fusion(depth=2, heads=4, hidden=128),
    ),
}


def sized(
    vision: str = "b16",
    text: str = "base",
    *,
    variant: str = "youku",
    frames: int = 4,
    contrastive_width: int = 256,
    matching: bool = True,
    masked: bool = True,
    classes: int = 0,
    entities: int = 0,
) -> ALPRO:
    """A model of named sizes.

    The ViT-B/16 of variant "salesforce" has 12 heads and stochastic depth 0.1, that of "youku" has 8 heads and none.

    Args:
      vision: one of `VISIONS`.
      text: one of `TEXTS`.
      variant: one of `VARIANTS`.
      frames: T.
      contrastive_width: see `ALPRO`.
      matching: see `ALPRO`.
      masked: see `ALPRO`.
      classes: see `ALPRO`.
      entities: see `ALPRO`.

    Raises:
      ValueError: a size or the variant is unknown.
    """
    for what, name, known in (
        ("vision tower", vision, VISIONS),
        ("text encoder", text, TEXTS),
        ("variant", variant, VARIANTS),
    ):
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; choose one of {', '.join(known)}")
    tower = VISIONS[vision].clone(frames=frames)
    return ALPRO(
        vision=tower.clone(heads=12, drop_path=0.1) if variant == "salesforce" and vision == "b16" else tower,
        text=TEXTS[text][0],
        fusion=TEXTS[text][1],
        contrastive_width=contrastive_width,
        matching=matching,
        masked=masked,
        classes=classes,
        entities=entities,
        variant=variant,
    )
