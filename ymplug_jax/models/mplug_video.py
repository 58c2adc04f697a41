"""mPLUG-video: TimeSformer, visual abstractor, connector and a frozen language model.

Xu et al., "Youku-mPLUG: A 10 million large-scale Chinese video-language dataset for pre-training and benchmarks", 2023. The
visual tokens stand in front of the text; there is no separator and no type embedding.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.core.sharding import AxisRules, constrain
from ymplug_jax.models import abstractor, language_models, layers, timesformer
from ymplug_jax.models.abstractor import Abstractor
from ymplug_jax.models.language_model import LanguageModel, last_state
from ymplug_jax.models.timesformer import TimeSformer

FROZEN = (r"llm/(?!blocks/lora/).*",)  # path regexes, full match; adapters of the language model are trained
# What an image tower lacks: a pre-training that starts from one leaves it at its start values.
TEMPORAL = ("vision/temporal_embed", "vision/blocks/temporal_.*")
# Tables that may have another size in a checkpoint: other resolution, other number of frames.
RESIZE = {
    "vision/pos_embed": lambda table, shape: layers.resize_pos_embed(table, shape[0] - 1),
    "vision/temporal_embed": lambda table, shape: layers.resize_temporal_embed(table, shape[0]),
}


def _under(prefix: str, axes: AxisRules) -> tuple[tuple[str, str], ...]:
    return tuple((prefix + path, words) for path, words in axes)


_OWN_AXES = (
    *_under("vision/", timesformer.AXES),
    *_under("abstractor/", abstractor.AXES),
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
    """Axis words of the model's parameters by path; those of its language model depend on the kind."""
    return (*_OWN_AXES, *_under("llm/", language_models.axes_of(model.llm)))


class Connector(nn.Module):
    """From the vision width to the language model's: f[B, Q, D] -> f[B, Q, H]."""

    width: int
    norm: bool
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[B, Q, D] -> f[B, Q, H]."""
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
    """Classifier on a state of the language model: f[..., H] -> f32[..., C]."""

    classes: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[..., H] -> f32[..., C]."""
        init, dtype = layers.torch_linear(x.shape[-1]), jnp.dtype(self.dtype)
        x = nn.relu(nn.Dense(x.shape[-1], kernel_init=init, bias_init=init, dtype=dtype, name="hidden")(x))
        out = nn.Dense(self.classes, kernel_init=init, bias_init=init, dtype=dtype, name="out")(x)  # [..., C]
        return out.astype(jnp.float32)


class MPLUGVideo(nn.Module):
    """The whole model. Parameters: {vision, abstractor, connector, llm}, with contrastive heads {vision_proj, text_proj,
    temperature}, with a classifier {head}. H is the width of the language model, D that of the vision tower, E the contrastive width.
    """

    vision: TimeSformer = TimeSformer()
    abstractor: Abstractor = Abstractor()
    llm: LanguageModel = language_models.SIZES["1.3b"]
    contrastive_width: int = 0  # E; 0: no contrastive heads
    connector_norm: bool = False  # a norm after the connector
    classes: int = 0  # C; 0: no classifier head

    def setup(self) -> None:
        """The towers are fields; the connector and the heads that the fields ask for are made here."""
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
        """Normalised video f[B, T, S, S, 3] -> what the other methods take.

        Returns:
          tokens: f[B, 1 + T * P, D], row 0 is cls.
          image_query: f[B, Q, D], output of the abstractor.
          prefix: f[B, Q, H], the visual tokens in front of the text.
        """
        tokens = constrain(self.vision(video), "batch", None, None)
        image_query = self.abstractor(tokens)
        prefix = constrain(self.connector(image_query), "batch", None, None)
        return {"tokens": tokens, "image_query": image_query, "prefix": prefix}

    def hidden(self, prefix: jax.Array | None, ids: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Hidden states after the final norm. The state at Q + j predicts token j + 1; prefix None is the text-only pass (Q = 0).

        Args:
          prefix: f[B, Q, H] or None.
          ids: int[B, L].
          deterministic: False applies the language model's dropout (randomness "dropout").

        Returns:
          f[B, Q + L, H].
        """
        embeds = self.llm.embed(ids)  # [B, L, H]
        if prefix is not None:
            embeds = jnp.concatenate([prefix.astype(embeds.dtype), embeds], axis=1)  # [B, Q + L, H]
        return constrain(self.llm(embeds, deterministic=deterministic), "batch", None, None)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f[..., H] -> f32[..., V]; pass only the positions that predict text, `hidden[:, Q:-1]`."""
        return self.llm.logits(hidden)

    def contrastive(self, image_query: jax.Array, text_hidden: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """Unit vectors for the contrastive loss, in float32.

        Args:
          image_query: f[B, Q, D].
          text_hidden: f[B, L, H] of the text-only pass.
          mask: int or bool[B, L]; the text is the state at its last token.

        Returns:
          video: f32[B, Q, E]; text: f32[B, E]; temperature: f32 scalar.
        """
        return {
            "video": layers.unit(self.vision_proj(image_query)),
            "text": self.embed_text(text_hidden, mask),
            "temperature": self.temperature.astype(jnp.float32),
        }

    def embed_video(self, video: jax.Array) -> jax.Array:
        """Unit vector of a video for retrieval, from the cls token alone: f[B, T, S, S, 3] -> f32[B, E]."""
        tokens = constrain(self.vision(video), "batch", None, None)
        return layers.unit(self.vision_proj(tokens[:, 0]))

    def embed_text(self, text_hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """Unit vector of a text: f[B, L, H] of the text-only pass, int or bool[B, L] -> f32[B, E]."""
        return layers.unit(self.text_proj(last_state(text_hidden, mask)))

    def classify(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        """Logits of the head on the state at the last text token: f[B, Q + L, H], int or bool[B, L] -> f32[B, C]."""
        return self.head(last_state(hidden[:, -mask.shape[1] :], mask))

    def __call__(
        self, video: jax.Array, ids: jax.Array, mask: jax.Array
    ) -> dict[str, jax.Array | dict[str, jax.Array]]:
        """Every part once; what `init` traces. Tasks call the methods they need."""
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
    """Fresh float32 parameters, as the reference starts them. Run it under `jax.jit` or `jax.eval_shape`: no forward pass remains."""
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
    """A model of named sizes: llm one of `language_models.SIZES`, vision one of `VISIONS`. Change further fields with `.clone(...)`.

    Raises:
      ValueError: an unknown size.
    """
    llms = language_models.SIZES
    if llm not in llms or vision not in VISIONS:
        raise ValueError(
            f"size {llm!r} x {vision!r} is unknown; language models: {', '.join(llms)}; vision: {', '.join(VISIONS)}"
        )
    pool = Abstractor(queries=queries, heads=VISIONS[vision].heads, mlp_ratio=VISIONS[vision].mlp_ratio)
    return MPLUGVideo(
        vision=VISIONS[vision].clone(frames=frames),
        abstractor=pool,
        llm=llms[llm],
        contrastive_width=contrastive_width,
        classes=classes,
    )
