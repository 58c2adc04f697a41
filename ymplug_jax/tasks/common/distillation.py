"""Cross-entropy of tokens, mixed with the distribution of a teacher (docs/models/mplug2.md, "Masked words")."""

import jax
import jax.numpy as jnp

from ymplug_jax.tasks.common import losses


def token_losses(
    logits: jax.Array, targets: jax.Array, taught: jax.Array, alpha: jax.Array | float, *, over_positions: bool = False
) -> jax.Array:
    """Loss of each position, (1 - alpha) * cross-entropy + alpha * -sum(taught * log softmax(logits)), in float32.

    Args:
      logits: f[B, L, V].
      targets: int[B, L], ids in [0, V).
      taught: f32[B, L, V], the teacher's distribution; it gets no gradient.
      alpha: weight of the teacher.
      over_positions: takes the logarithm of a softmax over the L positions instead of the vocabulary, as the reference does.

    Returns:
      f32[B, L].
    """
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-2 if over_positions else -1)
    soft = -jnp.sum(jax.lax.stop_gradient(taught) * logs, axis=-1)
    return (1 - alpha) * losses.token_losses(logits, targets) + alpha * soft
