"""What models are trained and evaluated for, by family. For use by themselves: `metrics` (recalls, top-k) and `ranking` of a gallery."""

from ymplug_jax.tasks.common import ranking
from ymplug_jax.tasks.common import task_metrics as metrics

__all__ = ["metrics", "ranking"]
