"""Layouts of runs of the chat model on TPU slices."""

from ymplug_jax.core.config import Experiment

SLICES: dict[str, object] = {}


def on(experiment: Experiment, size: str, name: str) -> Experiment:
    """Apply the layout of a slice to an experiment.

    Raises:
      ValueError: The slice is unknown.
    """
    raise ValueError(f"unknown slice {name!r}; there is no layout yet")
