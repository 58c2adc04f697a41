"""Visual abstractor of mPLUG-video: learned queries draw a fixed number of tokens out of the video (one cross-attention layer)."""

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
    """Attention pooling. The residual path carries the *normalised* queries: released weights depend on it."""

    queries: int = 128  # Q
    heads: int = 8
    mlp_ratio: float = 4.0
    dtype: str = "float32"  # of the computation

    @nn.compact
    def __call__(self, context: jax.Array) -> jax.Array:
        """f[B, S, D] -> f[B, Q, D]; no norm at the end."""
        b, _, d = context.shape
        dtype, torch_linear = jnp.dtype(self.dtype), layers.torch_linear
        queries = self.param("queries", nn.initializers.normal(0.015), (self.queries, d))
        x = layers.norm("query_norm", EPS, self.dtype)(queries.astype(dtype))[None]  # [1, Q, D]
        context = layers.norm("context_norm", EPS, self.dtype)(context)

        xavier = layers.uniform((6 / (4 * d)) ** 0.5)  # of q, k and v seen as one [3D, D] matrix
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
