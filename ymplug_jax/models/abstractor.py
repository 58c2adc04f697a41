"""Visual abstractor of mPLUG-video: one cross-attention layer in which learned queries pool the video tokens.

Described in docs/models/mplug_video.md, "Visual abstractor".
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.models import attention, layers

EPS = 1e-6

AXES = (
    ("queries", "queries embed"),
    ("(query_norm|context_norm|mlp_norm)/(scale|bias)", "embed"),
    ("attn/[qkv]/kernel", "embed heads head_dim"),
    ("attn/[qkv]/bias", "heads head_dim"),
    ("attn/o/kernel", "heads head_dim embed"),
    ("attn/o/bias", "embed"),
    ("(extra_key|extra_value)", "heads head_dim"),
    ("mlp/up/kernel", "embed mlp"),
    ("mlp/up/bias", "mlp"),
    ("mlp/down/kernel", "mlp embed"),
    ("mlp/down/bias", "embed"),
)


class Abstractor(nn.Module):
    """Attention pooling with learned queries.

    The residual path carries the *normalised* queries, because released weights were trained that way.
    """

    queries: int = 128  # Number of learned queries Q, that is, of visual tokens that the language model reads.
    heads: int = 8  # Number of attention heads, which must divide the width of the vision tower.
    mlp_ratio: float = 4.0  # Width of the MLP as a multiple of the vision tower's width.
    dtype: str = "float32"  # Type of the computation; parameters and norms stay float32.

    @nn.compact
    def __call__(self, context: jax.Array) -> jax.Array:
        """Pool video tokens, f[B, S, D] -> f[B, Q, D], without a final norm."""
        b, _, d = context.shape
        dtype, torch_linear = jnp.dtype(self.dtype), layers.torch_linear
        queries = self.param("queries", nn.initializers.normal(0.015), (self.queries, d))
        x = layers.norm("query_norm", EPS, self.dtype)(queries.astype(dtype))[None]  # [1, Q, D]
        context = layers.norm("context_norm", EPS, self.dtype)(context)

        xavier = layers.uniform((6 / (4 * d)) ** 0.5)  # Xavier bound of the stacked [3D, D] matrix of q, k and v
        attn = layers.Attention(d, self.heads, xavier, torch_linear(d), dtype=self.dtype, name="attn")
        q, k, v = attn.project(x, context)  # [1, Q, N, H], [B, S, N, H] twice

        def append(keys: jax.Array, name: str) -> jax.Array:
            extra = self.param(name, nn.initializers.normal(d**-0.5), keys.shape[2:]).astype(dtype)
            return jnp.concatenate([keys, jnp.broadcast_to(extra, (b, 1, *extra.shape))], axis=1)  # [B, S + 1, N, H]

        q = jnp.broadcast_to(q, (b, *q.shape[1:]))  # [B, Q, N, H]
        x = x + attn.output(attention.attend(q, append(k, "extra_key"), append(v, "extra_value")))  # [B, Q, D]
        hidden = int(self.mlp_ratio * d)
        up, down = torch_linear(d), torch_linear(hidden)
        mlp = layers.Mlp(hidden, up, down, up_bias_init=up, down_bias_init=down, dtype=self.dtype, name="mlp")
        return x + mlp(layers.norm("mlp_norm", EPS, self.dtype)(x))
