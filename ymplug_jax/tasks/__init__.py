"""Training and evaluation tasks by model family. `metrics` (recalls, top-k) and `ranking` can be used on their own."""

from ymplug_jax.tasks.common import ranking
from ymplug_jax.tasks.common import task_metrics as metrics

__all__ = ["metrics", "ranking"]
