"""Settings shared by all tiny runs: 4 frames of 64 pixels and an optimizer for short runs."""

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
    """Settings of a tiny run.

    Args:
      task: Name of the task.
      model: A linen module.
      options: Options of the task; None: the task's defaults.
      max_tokens: Tokens per text.
      lr: Peak learning rate.
      warmup: Duration of the warm-up from 0 to the peak.
      no_decay: Path patterns of the parameters without weight decay.
      batch_size: Global batch size.
      duration: Duration of the run.
      every: Interval of checkpoints and of evaluations.
      frozen_dtype: Dtype of the frozen parameters.
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
