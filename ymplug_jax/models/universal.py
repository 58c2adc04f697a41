"""Universal layers, which read text and video with one set of weights, and a fusion encoder with cross-attention (mPLUG-2).

Xu et al., "mPLUG-2: a modularized multi-modal foundation model across text, image and video", 2023. Described in
docs/models/mplug2.md, "Universal layers" and "Fusion encoder".
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.models import bert, layers
from ymplug_jax.models.language_model import Memory

UNIVERSAL_AXES = (("latents", "queries embed"), *bert.CROSS_AXES)
FUSION_AXES = (*bert.CROSS_AXES, *((path.replace("blocks/", "connected/"), words) for path, words in layers.BLOCK_AXES))

# One layer of a stack: states f[B, L, D], bias of the logits or None, memory or None -> f[B, L, D].
Layer = Callable[[jax.Array, jax.Array | None, Memory | None], jax.Array]


def _stack(owner: "Universal | Fusion", depth: int) -> nn.Module:
    """A stack of `bert.Block`, scanned over `depth` layers."""
    blocks = layers.stack(bert.Block, depth, remat=owner.remat, in_axes=(nn.broadcast,) * 3, static_argnums=(3,))
    return blocks(**_settings(owner))


def _settings(owner: "Universal | Fusion") -> dict:
    own = {name: getattr(owner, name) for name in ("heads", "hidden", "ln_eps", "dropout", "dtype")}
    return own | ({"attn_dropout": owner.attn_dropout} if isinstance(owner, Universal) else {})


def _rates(owner: "Universal | Fusion") -> float:
    """Return 0 if training drops nothing."""
    return max(owner.dropout, owner.attn_dropout if isinstance(owner, Universal) else 0.0)


def _layers_of(owner: "Universal | Fusion", stack: nn.Module, depth: int, deterministic: bool) -> list[Layer]:
    """The layers of an initialised stack one by one, for passes in which they do not all play the same part."""
    block, params = bert.Block(**_settings(owner), parent=None), stack.variables["params"]

    def run(i: int, key: jax.Array | None, x: jax.Array, bias: jax.Array | None, memory: Memory | None) -> jax.Array:
        own = jax.tree.map(lambda leaf: leaf[i], params)
        rngs = {} if key is None else {"dropout": key}
        return block.apply({"params": own}, x, bias, deterministic, memory, rngs=rngs)[0]

    def one(i: int) -> Layer:
        key = None if deterministic or not _rates(owner) else owner.make_rng("dropout")
        layer = partial(run, i, key)
        return layer if owner.remat == "none" else jax.checkpoint(layer, policy=layers.REMAT[owner.remat])

    return [one(i) for i in range(depth)]


def _memory(tokens: jax.Array) -> Memory | None:
    """What a text reads of a video f[B, M, D]: nothing if M is 0."""
    return Memory(tokens) if tokens.shape[1] else None


class Universal(nn.Module):
    """The last layers of the text encoder, which read video too; its fields are its settings.

    Self-attention and MLP serve both; cross-attention and latents serve video alone.
    """

    width: int = 768  # Width of the states D.
    depth: int = 2  # Number of layers.
    queries: int = 50  # Number of latents that gather the video.
    heads: int = 12  # Number of attention heads, which must divide the width.
    hidden: int = 3072  # Width of the MLP M.
    ln_eps: float = 1e-12  # Epsilon of the LayerNorms.
    dropout: float = 0.1  # Dropout rate before each residual sum in training.
    attn_dropout: float = 0.1  # Dropout rate on attention in training.
    remat: str = "none"  # Backward pass recomputes nothing ("none"), all but matrix products ("dots") or all ("full").
    dtype: str = "float32"  # Type of the computation; norms and softmax stay float32.

    def setup(self) -> None:
        """Create the latents and the stack of layers."""
        self.latents = self.param("latents", nn.initializers.normal(1.0), (self.queries, self.width))
        self.blocks = _stack(self, self.depth)

    def _create(self) -> None:
        """Create all parameters, whichever path is initialised."""
        if self.is_initializing():
            x = jnp.zeros((1, 1, self.width), jnp.dtype(self.dtype))
            self.blocks(x, None, True, Memory(x))

    def read_text(self, x: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Run all layers on a text without cross-attention.

        Args:
          x: f[B, L, D], states of the layers below.
          mask: int or bool[B, L], 1 at tokens.
          deterministic: False applies dropout, which needs the random stream "dropout".

        Returns:
          f[B, L, D].
        """
        self._create()
        return self.blocks(x, bert.added(mask), deterministic, None)[0]

    def read_video(self, tokens: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Run all layers on a video: all but the last gather the tokens in the latents, the last reads the latents back.

        Args:
          tokens: f[B, M, D], all visible.
          deterministic: False applies dropout, which needs the random stream "dropout".

        Returns:
          f[B, M, D], without the sum with `tokens`. Every layer's output is sown as the intermediate "video".
        """
        self._create()
        tokens = tokens.astype(jnp.dtype(self.dtype))
        x = jnp.broadcast_to(self.latents.astype(tokens.dtype), (len(tokens), *self.latents.shape))  # [B, Q, D]
        *gather, spread = _layers_of(self, self.blocks, self.depth, deterministic)
        for layer in gather:
            x = layer(x, None, Memory(tokens))
            self.sow("intermediates", "video", x)
        x = spread(tokens, None, Memory(x))  # [B, M, D]
        self.sow("intermediates", "video", x)
        return x


class Fusion(nn.Module):
    """Layers in which a text reads a video by cross-attention; its fields are its settings.

    With `stride`, every stride-th layer but the first is connected: it runs self-attention over [video ; text] instead.
    """

    width: int = 768  # Width of the states D.
    depth: int = 6  # Number of layers.
    stride: int = 0  # Every stride-th layer but the first is connected; 0: none.
    heads: int = 12  # Number of attention heads, which must divide the width.
    hidden: int = 3072  # Width of the MLP M.
    ln_eps: float = 1e-12  # Epsilon of the LayerNorms.
    dropout: float = 0.1  # Dropout rate on attention and before each residual sum in training.
    remat: str = "none"  # Backward pass recomputes nothing ("none"), all but matrix products ("dots") or all ("full").
    dtype: str = "float32"  # Type of the computation; norms and softmax stay float32.

    def is_connected(self, layer: int) -> bool:
        """Whether a layer, counted from 0, is connected."""
        return bool(layer and self.stride and layer % self.stride == 0)

    def setup(self) -> None:
        """Create the stack of layers with cross-attention and, if any layer is connected, the stack of connected layers."""
        self.joined = sum(map(self.is_connected, range(self.depth)))
        self.blocks = _stack(self, self.depth - self.joined)
        if self.joined:
            self.connected = _stack(self, self.joined)

    def __call__(
        self, states: jax.Array, mask: jax.Array, tokens: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array]:
        """Run all layers.

        Args:
          states: f[B, L, D], the text.
          mask: int or bool[B, L], 1 at its tokens.
          tokens: f[B, M, D], the video, all visible. M 0: the text alone, which skips cross-attention.
          deterministic: False applies dropout, which needs the random stream "dropout".

        Returns:
          The video f[B, M, D], which only connected layers change, and the text f[B, L, D]. With connected layers, every layer's
          output is sown as the intermediate "layer".
        """
        dtype = jnp.dtype(self.dtype)
        states, tokens, bias = states.astype(dtype), tokens.astype(dtype), bert.added(mask)
        if not self.joined:
            return tokens, self.blocks(states, bias, deterministic, _memory(tokens))[0]
        if self.is_initializing():
            self.blocks(states, bias, True, Memory(tokens))
            self.connected(states, bias, True, None)
        both = jnp.concatenate([jnp.ones(tokens.shape[:2], jnp.int32), mask.astype(jnp.int32)], axis=1)
        cross = iter(_layers_of(self, self.blocks, self.depth - self.joined, deterministic))
        connected = iter(_layers_of(self, self.connected, self.joined, deterministic))
        for i in range(self.depth):
            if self.is_connected(i):
                x = next(connected)(jnp.concatenate([tokens, states], axis=1), bert.added(both), None)  # [B, M + L, D]
                self.sow("intermediates", "layer", x)
                tokens, states = tokens + x[:, : tokens.shape[1]], x[:, tokens.shape[1] :]
            else:
                states = next(cross)(states, bias, _memory(tokens))
                self.sow("intermediates", "layer", states)
        return tokens, states
