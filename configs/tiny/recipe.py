"""What all tiny runs share: frames of 64 pixels, few of them, and the optimizer for a short run."""

from typing import Any

from ml_collections import ConfigDict

from configs.mplug_video import recipe
from ymplug_jax.core.config import Data, Experiment, Optim, Train, to_config_dict


def settings(
    task: str,
    model: Any,
    options: Any = None,
    *,
    max_tokens: int = 40,
    lr: float = 3e-4,
    warmup: str = "30 steps",
    no_decay: tuple[str, ...] = recipe.NO_DECAY,
    batch_size: int = 16,
    duration: str = "500 steps",
    every: str = "500 steps",
    frozen_dtype: str = "float32",
) -> ConfigDict:
    """Resolved settings of a task.

    Args:
      task: its name.
      model: a linen module.
      options: of the task; None: it has none.
      max_tokens: of a text.
      lr: peak of the rate.
      warmup: from 0 to the peak.
      no_decay: patterns of the parameters without weight decay.
      batch_size: examples a step.
      duration: of the run.
      every: between checkpoints, and between evaluations.
      frozen_dtype: in which frozen parameters are kept.
    """
    experiment = Experiment(
        task=task,
        model=model,
        data=Data(frames=4, image_size=64, max_tokens=max_tokens, threads=2),
        optim=Optim(lr=lr, min_lr=1e-5, warmup=warmup, clip=1.0, no_decay=no_decay),
        train=Train(
            batch_size=batch_size,
            duration=duration,
            log_every="20 steps",
            save_every=every,
            eval_every=every,
            frozen_dtype=frozen_dtype,
        ),
        **({} if options is None else {"options": options}),
    )
    return to_config_dict(experiment)
