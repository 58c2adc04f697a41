"""Visual abstractor of the chat model: a fixed number of slots for every image and clip (docs/models/mplug_chat.md).

Ye et al., "mPLUG-Owl: modularization empowers large language models with multimodality", 2023. Learned queries attend to
themselves and to all vision tokens. There is no position embedding here: the order of the frames reaches the language model only
through the adapters of the vision tower.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.models import attention, layers

EPS = 1e-5  # of the norms around attention and before the MLP
MLP_EPS = 1e-6  # of the norm inside the MLP
STD = 0.02

AXES = (
    ("(queries|temporal_queries)", "queries embed"),
    ("blocks/(query_norm|context_norm|mlp_norm)/(scale|bias)", "layers embed"),
    ("blocks/attn/[qkv]/kernel", "layers embed heads head_dim"),
    ("blocks/attn/[qkv]/bias", "layers heads head_dim"),
    ("blocks/attn/o/kernel", "layers heads head_dim embed"),
    ("blocks/attn/o/bias", "layers embed"),
    ("blocks/mlp/(gate|up)/kernel", "layers embed mlp"),
    ("blocks/mlp/(gate|up)/bias", "layers mlp"),
    ("blocks/mlp/norm/(scale|bias)", "layers mlp"),
    ("blocks/mlp/down/kernel", "layers mlp embed"),
    ("blocks/mlp/down/bias", "layers embed"),
    ("(proj|temporal_proj)/kernel", "embed embed"),
    ("(proj|temporal_proj)/bias", "embed"),
    ("end", "embed"),
)


class Mlp(nn.Module):
    """down(norm(silu(gate(x)) * up(x))), all with biases: f[..., D] -> f[..., D]. SiLU is float32."""

    hidden: int  # Width between the layers M.
    std: float  # Standard deviation of the initial kernels.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f[..., D] -> f[..., D]."""
        normal, dtype = nn.initializers.normal(self.std), jnp.dtype(self.dtype)

        def dense(name: str, features: int) -> nn.Dense:
            return layers.Dense(features, kernel_init=normal, dtype=dtype, name=name)

        gate, up = layers.kept(dense("gate", self.hidden)(x)), layers.kept(dense("up", self.hidden)(x))  # [..., M]
        y = nn.silu(gate.astype(jnp.float32)).astype(dtype) * up
        return layers.kept(dense("down", x.shape[-1])(layers.norm("norm", MLP_EPS, self.dtype)(y)))


class Block(nn.Module):
    """One layer: f[M, Q, D] -> f[M, Q, D]. The residual path carries the normalised queries: released weights depend on it."""

    heads: int  # Number of attention heads.
    mlp: int  # Width of the MLP M.
    dropout: float  # Dropout rate in training.
    std: float  # Standard deviation of the initial kernels.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(
        self, x: jax.Array, context: jax.Array, mask: jax.Array | None, deterministic: bool
    ) -> tuple[jax.Array, None]:
        """Queries f[M, Q, D], vision tokens f[M, S, D], bool[M, S] or None -> (queries f[M, Q, D], None)."""
        m, q, d = x.shape
        normal = nn.initializers.normal(self.std)
        attn = layers.Attention(d, self.heads, normal, normal, dtype=self.dtype, name="attn")
        x = layers.norm("query_norm", EPS, self.dtype)(x)
        keys = jnp.concatenate([x, layers.norm("context_norm", EPS, self.dtype)(context)], axis=1)  # [M, Q + S, D]
        seen = None if mask is None else jnp.concatenate([jnp.ones((m, q), bool), mask], axis=1)
        rate = 0.0 if deterministic else self.dropout
        key = self.make_rng("dropout") if rate > 0 else None
        y = attention.attend(*attn.project(x, keys), key_mask=seen, dropout=rate, key=key)  # [M, Q, N, H]
        x = x + attn.output(y)
        return x + Mlp(self.mlp, self.std, self.dtype, name="mlp")(layers.norm("mlp_norm", EPS, self.dtype)(x)), None


class QueryAbstractor(nn.Module):
    """Vision tokens -> slots for the language model. The fields are its settings."""

    queries: int = 64  # Number of learned queries for images Q; clips add as many temporal queries.
    depth: int = 6  # Number of layers.
    heads: int = 16  # Number of attention heads.
    mlp: int = 2816  # Width of the MLP M.
    dropout: float = 0.1  # Dropout rate on the attention probabilities in training.
    std: float = STD  # Standard deviation of the initial kernels.
    table_std: float = STD  # Standard deviation of the initial queries and of the end vector.
    remat: str = "none"  # Backward pass recomputes nothing ("none"), all but matrix products ("dots") or all ("full").
    dtype: str = "float32"  # Type of the computation; norms, softmax and activations stay float32.

    @property
    def slots(self) -> int:
        """Vectors that one image or clip takes in a prompt."""
        return self.queries + 1

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        width: int,
        mask: jax.Array | None = None,
        *,
        temporal: bool | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        """Vision tokens of images or clips -> slots.

        Args:
          tokens: f[M, T, N, D] of the vision tower.
          width: H of the language model.
          mask: bool[M, T, N], False where a token must not be seen; None: all are seen.
          temporal: whether the temporal queries take part; None: in clips (T > 1) only.
          deterministic: False applies dropout, with the randomness "dropout".

        Returns:
          f[M, Q + 1, H]: the projected queries, temporal ones added row by row, and the end vector.
        """
        m, t, n, d = tokens.shape
        dtype, normal = jnp.dtype(self.dtype), nn.initializers.normal(self.table_std)
        temporal = t > 1 if temporal is None else temporal
        x = self.param("queries", normal, (self.queries, d))
        if temporal:
            x = jnp.concatenate([x, self.param("temporal_queries", normal, (self.queries, d))])
        x = jnp.broadcast_to(x.astype(dtype), (m, *x.shape))  # [M, Q or 2Q, D]
        seen = None if mask is None else mask.reshape(m, t * n).astype(bool)
        in_axes = (nn.broadcast, nn.broadcast, nn.broadcast)
        blocks = layers.stack(Block, self.depth, remat=self.remat, in_axes=in_axes, static_argnums=(4,))
        blocks = blocks(
            heads=self.heads, mlp=self.mlp, dropout=self.dropout, std=self.std, dtype=self.dtype, name="blocks"
        )
        x, _ = blocks(x, tokens.reshape(m, t * n, d).astype(dtype), seen, deterministic)

        def project(name: str) -> nn.Dense:
            return layers.Dense(width, kernel_init=nn.initializers.normal(self.std), dtype=dtype, name=name)

        y = project("proj")(x[:, : self.queries])  # [M, Q, H]
        if temporal:
            y = y + project("temporal_proj")(x[:, self.queries :])
        end = self.param("end", normal, (width,)).astype(dtype)
        return jnp.concatenate([y, jnp.broadcast_to(end, (m, 1, width))], axis=1)  # [M, Q + 1, H]
