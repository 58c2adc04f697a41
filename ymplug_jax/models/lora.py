"""LoRA adapters: trained low-rank updates of a frozen decoder's q, k and v projections.

Hu et al., "LoRA: low-rank adaptation of large language models", 2021. Described in docs/models/language_models.md, "LoRA".
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from ymplug_jax.core import quantize
from ymplug_jax.models import layers

AXES = (
    ("blocks/lora/a", "layers embed rank"),
    ("blocks/lora/[qkv]", "layers rank heads head_dim"),
)


class Lora(nn.Module):
    """Low-rank update of the q, k and v projections, which share the factor A; the update starts at zero."""

    rank: int  # Rank R.
    scale: float  # Factor of the update, alpha / R.
    heads: int  # Number of attention heads.
    dtype: str  # Type of the computation.

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The updates of q, k and v: f[..., D] -> f[..., N, H] each."""
        d, dtype = x.shape[-1], jnp.dtype(self.dtype)
        a = quantize.matrix(self.param("a", layers.torch_linear(d), (d, self.rank))).astype(dtype)
        low = (x @ a) * self.scale  # [..., R]

        def out(name: str) -> jax.Array:
            b = self.param(name, nn.initializers.zeros, (self.rank, self.heads, d // self.heads)).astype(dtype)
            return jnp.einsum("...r,rnh->...nh", low, b)

        return out("q"), out("k"), out("v")
