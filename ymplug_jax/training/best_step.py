"""The step of a run with the best score so far, kept as a run's folder of its own at WORKDIR/best.

Whatever takes the folder of a run (evaluation, `predict`, `config.train.init_from`, `compare`) takes WORKDIR/best as well. Its
frozen half is that of the run and is not copied.
"""

import contextlib
import json
import math
from typing import Any

import jax
from etils import epath

from ymplug_jax.core.checkpoint import Checkpoints
from ymplug_jax.core.checkpoint_files import BEST, place_of, steps_of
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.state import TrainState
from ymplug_jax.training import run_folder

NOTE = "best.json"  # {"score", "value", "step"} in that folder


class Best:
    """Keeps one step. A score that is equal to the best one does not replace it."""

    def __init__(self, experiment: Experiment, workdir: epath.Path):
        self._experiment, self._folder = experiment, workdir / BEST
        self._name = experiment.train.best
        self._value = self._stored()

    def offer(
        self,
        state: TrainState,
        step: int,
        examples_seen: int,
        scores: dict[str, Any],
        frozen_sums: dict[str, str] | None,
    ) -> bool:
        """Save the state if its score is better than all before. All processes call it with the same scores.

        Returns:
          Whether it was saved.

        Raises:
          Mistake: the task has no such score.
          PlaceFailed: the folder cannot be written.
        """
        value = scores.get(self._name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            numbers = sorted(name for name, value in scores.items() if isinstance(value, float))
            raise Mistake(
                f"config.train.best is {self._name!r}; this evaluation has no such score, it has {', '.join(numbers)}"
            )
        if not (math.isnan(self._value) or self._better(value)):
            return False
        with contextlib.closing(Checkpoints(str(self._folder), keep=1, frozen_sums=frozen_sums)) as checkpoints:
            checkpoints.save(state, step, examples_seen)
        if jax.process_index() == 0:
            with place_of(self._folder):
                run_folder.write(self._experiment, self._folder)
                note = {"score": self._name, "value": value, "step": step}
                (self._folder / NOTE).write_text(json.dumps(note) + "\n", encoding="utf-8")
        self._value = value
        return True

    def _better(self, value: float) -> bool:
        return value < self._value if lower_is_better(self._name) else value > self._value

    def _stored(self) -> float:
        """The score of the step that is kept, NaN if there is none by this name."""
        try:
            note = json.loads((self._folder / NOTE).read_text(encoding="utf-8"))
            if note["score"] == self._name and note["step"] in steps_of(self._folder):
                return float(note["value"])
        except (OSError, ValueError, TypeError, KeyError):  # none yet, or cut off by a kill
            pass
        return math.nan


def lower_is_better(name: str) -> bool:
    """Of losses and ranks; all other scores are better when they are higher."""
    last = name.rpartition("/")[2]
    return last == "loss" or last.endswith(("_loss", "_rank"))
