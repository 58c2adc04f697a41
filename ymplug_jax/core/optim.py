"""AdamW on the trainable parameters, with per-path weight decay and learning rate factors, and the published schedules.

See the section "Recipe" of docs/models/mplug_video.md and docs/models/alpro.md.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Optim

SCHEDULES = ("cosine", "linear", "bert", "mplug2")


class Group(NamedTuple):
    """Update settings of one parameter."""

    lr_scale: float
    weight_decay: float


def param_groups(paths: Iterable[str], optim: Optim) -> dict[str, Group]:
    """Return the learning rate factor and weight decay of every trainable path.

    Raises:
      Mistake: a pattern in the settings matches no path.
    """
    paths = list(paths)
    no_decay = state_lib.matching(paths, optim.no_decay, "config.optim.no_decay")
    state_lib.matching(paths, [pattern for pattern, _ in optim.lr_scales], "config.optim.lr_scales")

    def lr_scale(path: str) -> float:
        return next((factor for pattern, factor in optim.lr_scales if re.fullmatch(pattern, path)), 1.0)

    return {path: Group(lr_scale(path), 0.0 if path in no_decay else optim.weight_decay) for path in paths}


def schedule(optim: Optim, *, warmup: int, total: int) -> Callable[[jax.Array], jax.Array]:
    """Return the learning rate as a function of the step: int32 scalar -> float32 scalar.

    The warm-up rises linearly over `warmup` steps from 0 to the peak, both ends included. "cosine" then decays from the peak
    towards `min_lr` without quite reaching it; "linear" reaches `min_lr` at the last step. The rate is therefore 0 at step 0 and
    the peak occurs twice, as in the published recipe. "bert" counts steps from 1: it rises to the peak in `warmup` steps and
    decays linearly to 0 at the last step, with `min_lr` as lower bound. "mplug2" is `warmup_lr` at step 0, reaches the peak after
    `warmup` steps and then decays along a cosine that would reach `min_lr` at step `total`.

    Args:
      optim: settings.
      warmup: number of warm-up steps.
      total: number of steps of the run.

    Raises:
      ValueError: the warm-up is longer than the run, or the schedule is unknown.
    """
    if not 0 <= warmup <= total:
        raise ValueError(
            f"config.optim.warmup: {warmup} steps, but the run has {total}; shorten the warm-up or train longer"
        )
    if optim.schedule not in SCHEDULES:
        raise ValueError(
            f"config.optim.schedule: unknown schedule {optim.schedule!r}; choose one of {', '.join(SCHEDULES)}"
        )
    if optim.warmup_lr and optim.schedule != "mplug2":
        raise ValueError(
            f"config.optim.warmup_lr: schedule {optim.schedule!r} has none; set it to 0 or config.optim.schedule to mplug2"
        )
    rest = max(total - warmup, 1)
    peak, low = optim.lr, optim.min_lr

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.minimum(step, total - 1).astype(jnp.float32)
        up = peak * step / max(warmup - 1, 1)
        after = step - warmup
        if optim.schedule == "bert":
            up, down = peak * (step + 1) / max(warmup, 1), peak * (total - 1 - step) / rest
            return jnp.maximum(jnp.where(step + 1 < warmup, up, down), low)
        if optim.schedule == "mplug2":
            up = optim.warmup_lr + (peak - optim.warmup_lr) * step / max(warmup, 1)
        if optim.schedule in ("cosine", "mplug2"):
            down = low + 0.5 * (peak - low) * (1 + jnp.cos(jnp.pi * after / rest))
        else:
            down = peak + (low - peak) * after / max(rest - 1, 1)
        return jnp.where(step < warmup, up, down)

    return rate


def make(optim: Optim, trainable: state_lib.Params) -> optax.GradientTransformation:
    """Build the optimizer: clipping by global norm, Adam, decoupled weight decay and learning rate factors.

    The train step multiplies by the learning rate, because the schedule follows the global step, which also counts skipped
    updates.

    Args:
      optim: settings.
      trainable: the trainable parameters (arrays or ShapeDtypeStructs), float32.
    """
    groups = param_groups(state_lib.flatten(trainable), optim)
    decay = state_lib.unflatten({path: group.weight_decay for path, group in groups.items()})
    factor = state_lib.unflatten({path: group.lr_scale for path, group in groups.items()})

    def decay_and_scale(updates: Any, _: optax.OptState, params: Any) -> tuple[Any, optax.OptState]:
        updates = jax.tree.map(lambda u, p, d, f: f * (u + d * p), updates, params, decay, factor)
        return updates, optax.EmptyState()

    return optax.chain(
        optax.clip_by_global_norm(optim.clip),
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
        optax.GradientTransformation(lambda _: optax.EmptyState(), decay_and_scale),
    )
