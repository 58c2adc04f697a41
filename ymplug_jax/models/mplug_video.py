"""mPLUG-video: TimeSformer, visual abstractor, connector and a frozen language model.

Xu et al., "Youku-mPLUG: A 10 million large-scale Chinese video-language dataset for pre-training and benchmarks", 2023. The
visual tokens precede the text, without a separator or a type embedding. Described in docs/models/mplug_video.md.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.core import sharding
from ymplug_jax.core.sharding import AxisRules, constrain
from ymplug_jax.models import abstractor, language_models, layers, position_tables, timesformer
from ymplug_jax.models.abstractor import Abstractor
from ymplug_jax.models.language_model import LanguageModel, last_state
from ymplug_jax.models.timesformer import TimeSformer

FROZEN = (r"llm/(?!blocks/lora/).*",)  # path regexes, full match; LoRA adapters are trained
# Parameters that an image tower lacks; a pre-training that starts from one keeps their initial values.
TEMPORAL = ("vision/temporal_embed", "vision/blocks/temporal_.*")
# Tables that are resized if a checkpoint has another resolution or number of frames.
RESIZE = {
    "vision/pos_embed": lambda table, shape: position_tables.resize_pos_embed(table, shape[0] - 1),
    "vision/temporal_embed": lambda table, shape: position_tables.resize_temporal_embed(table, shape[0]),
}


_OWN_AXES = (
    *sharding.under("vision/", timesformer.AXES),
    *sharding.under("abstractor/", abstractor.AXES),
    ("connector/proj/kernel", "embed embed"),
    ("connector/(proj/bias|norm/scale|norm/bias)", "embed"),
    ("(vision_proj|text_proj)/kernel", "embed proj"),
    ("(vision_proj|text_proj)/bias", "proj"),
    ("temperature", ""),
    ("head/hidden/kernel", "embed embed"),
    ("head/hidden/bias", "embed"),
    ("head/out/kernel", "embed classes"),
    ("head/out/bias", "classes"),
)


def axes_of(model: "MPLUGVideo") -> AxisRules:
    """Logical axes of the parameters by path; those of the language model depend on its kind."""
    return (*_OWN_AXES, *sharding.under("llm/", language_models.axes_of(model.llm)))


class Connector(nn.Module):
    """Linear projection from the vision width D to the language model's width H."""

    width: int  # Width of the output H.
    norm: bool  # Adds a LayerNorm after the projection.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Project f[B, Q, D] -> f[B, Q, H]."""
        bias_init = layers.torch_linear(x.shape[-1])
        dense = nn.Dense(
            self.width,
            kernel_init=nn.initializers.normal(0.015),
            bias_init=bias_init,
            dtype=jnp.dtype(self.dtype),
            name="proj",
        )
        x = dense(x)  # [B, Q, H]
        return layers.norm("norm", 1e-6, self.dtype)(x) if self.norm else x


class Head(nn.Module):
    """Classifier on a hidden state of the language model: linear, ReLU, linear."""

    classes: int  # Number of classes C.
    dtype: str  # Type of the computation; logits are float32.

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of the classes, f[..., H] -> f32[..., C]."""
        init, dtype = layers.torch_linear(x.shape[-1]), jnp.dtype(self.dtype)
        x = nn.relu(nn.Dense(x.shape[-1], kernel_init=init, bias_init=init, dtype=dtype, name="hidden")(x))
        out = nn.Dense(self.classes, kernel_init=init, bias_init=init, dtype=dtype, name="out")(x)  # [..., C]
        return out.astype(jnp.float32)


class MPLUGVideo(nn.Module):
    """mPLUG-video with the heads that its fields ask for.

    Parameters: {vision, abstractor, connector, llm}; {vision_proj, text_proj, temperature} with `contrastive_width`; {head}
    with `classes`. D is the width of the vision tower and H that of the language model.
    """

    vision: TimeSformer = TimeSformer()  # Video encoder.
    abstractor: Abstractor = Abstractor()  # Visual abstractor.
    llm: LanguageModel = language_models.SIZES["1.3b"]  # Frozen language model; its `kind` names the decoder.
    contrastive_width: int = 0  # Width E of the contrastive heads; 0 leaves them out.
    connector_norm: bool = False  # Adds a LayerNorm after the connector.
    classes: int = 0  # Number of classes of the classifier head; 0 leaves it out.

    def setup(self) -> None:
        """Create the connector and the heads that the fields ask for; the towers are fields."""
        self.connector = Connector(self.llm.width, self.connector_norm, self.llm.dtype)
        if self.contrastive_width:

            def head(width: int) -> nn.Dense:
                init = layers.torch_linear(width)
                return nn.Dense(
                    self.contrastive_width, kernel_init=init, bias_init=init, dtype=jnp.dtype(self.llm.dtype)
                )

            self.vision_proj, self.text_proj = head(self.vision.width), head(self.llm.width)
            self.temperature = self.param("temperature", nn.initializers.constant(0.07), ())
        if self.classes:
            self.head = Head(self.classes, self.llm.dtype)

    def encode_video(self, video: jax.Array) -> dict[str, jax.Array]:
        """Encode a normalised video.

        Args:
          video: f[B, T, S, S, 3].

        Returns:
          tokens: f[B, 1 + T * P, D], of which row 0 is cls.
          image_query: f[B, Q, D], output of the abstractor.
          prefix: f[B, Q, H], the visual tokens in front of the text.
        """
        tokens = constrain(self.vision(video), "batch", None, None)
        image_query = self.abstractor(tokens)
        prefix = constrain(self.connector(image_query), "batch", None, None)
        return {"tokens": tokens, "image_query": image_query, "prefix": prefix}

    def hidden(self, prefix: jax.Array | None, ids: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Hidden states of the language model after the final norm; the state at Q + j predicts token j + 1.

        Args:
          prefix: f[B, Q, H]. None is the text-only pass, with Q = 0.
          ids: int[B, L].
          deterministic: False applies the language model's dropout, which needs the random stream "dropout".

        Returns:
          f[B, Q + L, H].
        """
        embeds = self.llm.embed(ids)  # [B, L, H]
        if prefix is not None:
            embeds = jnp.concatenate([prefix.astype(embeds.dtype), embeds], axis=1)  # [B, Q + L, H]
        return constrain(self.llm(embeds, deterministic=deterministic), "batch", None, None)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits of the vocabulary, f[..., H] -> f32[..., V]. Pass only the positions that predict text, `hidden[:, Q:-1]`."""
        return self.llm.logits(hidden)

    def contrastive(self, image_query: jax.Array, text_hidden: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """Unit vectors and temperature of the contrastive loss, in float32.

        Args:
          image_query: f[B, Q, D].
          text_hidden: f[B, L, H] of the text-only pass.
          mask: int or bool[B, L]; the last token's state represents the text.

        Returns:
          video: f32[B, Q, E]; text: f32[B, E]; temperature: f32 scalar.
        """
        return {
            "video": layers.unit(self.vision_proj(image_query)),
            "text": self.embed_text(text_hidden, mask),
            "temperature": self.temperature.astype(jnp.float32),
        }

    def embed_video(self, video: jax.Array) -> jax.Array:
        """Unit vector of a video for retrieval, from the cls token: f[B, T, S, S, 3] -> f32[B, E]."""
        tokens = constrain(self.vision(video), "batch", None, None)
        return layers.unit(self.vision_proj(tokens[:, 0]))

    def embed_text(self, text_hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """Unit vector of a text: f[B, L, H] of the text-only pass, int or bool[B, L] -> f32[B, E]."""
        return layers.unit(self.text_proj(last_state(text_hidden, mask)))

    def classify(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """Logits of the classifier on the last text token's state: f[B, Q + L, H], int or bool[B, L] -> f32[B, C]."""
        return self.head(last_state(hidden[:, -mask.shape[1] :], mask))

    def __call__(
        self, video: jax.Array, ids: jax.Array, mask: jax.Array
    ) -> dict[str, jax.Array | dict[str, jax.Array]]:
        """Run every part once, for `init`. Tasks call the methods they need."""
        seen = self.encode_video(video)
        hidden = self.hidden(seen["prefix"], ids)
        logits = self.logits(hidden[:, self.abstractor.queries : -1])  # [B, L - 1, V]
        out: dict[str, jax.Array | dict[str, jax.Array]] = {**seen, "hidden": hidden, "logits": logits}
        if self.contrastive_width:
            out["contrastive"] = self.contrastive(seen["image_query"], self.hidden(None, ids), mask)
        if self.classes:
            out["classes"] = self.classify(hidden, mask)
        return out


def init(model: MPLUGVideo, key: jax.Array) -> dict:
    """Initial float32 parameters. Call it under `jax.jit` or `jax.eval_shape`, which remove the forward pass."""
    vision = model.vision
    video = jnp.zeros((1, vision.frames, vision.image_size, vision.image_size, 3))
    ids = jnp.zeros((1, 2), jnp.int32)
    return model.init(key, video, ids, jnp.ones_like(ids))["params"]


VISIONS = {
    "b16": TimeSformer(patch_size=16, depth=12, width=768, heads=8),
    "l14": TimeSformer(patch_size=14, depth=24, width=1024, heads=16),
    "tiny": TimeSformer(image_size=64, patch_size=16, depth=2, width=64, heads=4),
}


def sized(
    llm: str = "1.3b",
    vision: str = "b16",
    *,
    queries: int = 128,
    frames: int = 4,
    contrastive_width: int = 0,
    classes: int = 0,
) -> MPLUGVideo:
    """A model of named sizes. Change further fields with `.clone(...)`.

    Args:
      llm: one of `language_models.SIZES`.
      vision: one of `VISIONS`.
      queries: Q.
      frames: T.
      contrastive_width: see `MPLUGVideo`.
      classes: see `MPLUGVideo`.

    Raises:
      ValueError: a size is unknown.
    """
    llms = language_models.SIZES
    if llm not in llms:
        raise ValueError(f"unknown language model {llm!r}; choose one of {', '.join(llms)}")
    if vision not in VISIONS:
        raise ValueError(f"unknown vision tower {vision!r}; choose one of {', '.join(VISIONS)}")
    pool = Abstractor(queries=queries, heads=VISIONS[vision].heads, mlp_ratio=VISIONS[vision].mlp_ratio)
    return MPLUGVideo(
        vision=VISIONS[vision].clone(frames=frames),
        abstractor=pool,
        llm=llms[llm],
        contrastive_width=contrastive_width,
        classes=classes,
    )
