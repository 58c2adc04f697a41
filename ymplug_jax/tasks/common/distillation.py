"""Cross-entropy of tokens, mixed with the distribution of a teacher (docs/models/mplug2.md, "Masked words")."""

from collections.abc import Callable

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


def words_of(
    logits_of: Callable[[jax.Array], jax.Array],
    taught_of: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    taught_hidden: jax.Array,
    labels: jax.Array,
    targets: jax.Array,
    alpha: jax.Array | float,
    *,
    keep_logits: bool = False,
    positions: int = 16,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`losses.words_of` with the distribution of a teacher: neither's logits of the whole batch are ever materialised.

    Args:
      logits_of: f[..., D] -> f[..., V].
      taught_of: The same of the teacher; no gradient.
      hidden: f[B, L, D].
      taught_hidden: f[B, L, D], the teacher's.
      labels: int[B, L].
      targets: bool[B, L], the positions that count.
      alpha: weight of the teacher.
      keep_logits: Save the logits for the backward pass instead of rematerialising them.
      positions: Positions of each row per product with the vocabulary.

    Returns:
      (sum of the losses, number of targets, number of correctly predicted targets), float32 scalars.
    """

    def add(sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], None]:
        states, of_teacher, labels, counts = part
        logits = logits_of(states)  # [B, width, V]
        taught = jax.nn.softmax(taught_of(of_teacher).astype(jnp.float32), axis=-1)
        right = (jnp.argmax(logits, axis=-1) == labels) & counts
        loss = jnp.sum(jnp.where(counts, token_losses(logits, labels, taught, alpha), 0))
        return (sums[0] + loss, sums[1] + jnp.sum(right, dtype=jnp.float32)), None

    zero = jnp.float32(0)
    step = add if keep_logits else jax.checkpoint(add)
    parts = losses.cut((hidden, jax.lax.stop_gradient(taught_hidden), labels, targets), positions)
    (loss, right), _ = jax.lax.scan(step, (zero, zero), parts)
    return loss, jnp.sum(targets, dtype=jnp.float32), right
