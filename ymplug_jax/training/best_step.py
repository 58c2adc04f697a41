"""Keep the checkpoint with the best evaluation score as a run folder of its own, WORKDIR/best.

WORKDIR/best works wherever a run folder does: evaluation, `predict`, `config.train.init_from` and `compare`. It shares the frozen
parameters of the run instead of copying them.
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
from ymplug_jax.training import introductions, run_folder

NOTE = "best.json"  # {"score": name, "value": float, "step": int} in WORKDIR/best


class Best:
    """Keeps one checkpoint: the earliest one with the best score."""

    def __init__(self, experiment: Experiment, workdir: epath.Path, *, higher_is_better: bool):
        """Load the best score so far, so that a resumed run continues from it.

        Args:
          experiment: settings of the run.
          workdir: folder of the run.
          higher_is_better: whether a higher value of the score `config.train.best` is better.
        """
        self._higher = higher_is_better
        self._experiment, self._folder = experiment, workdir / BEST
        self._name = experiment.train.best
        self._value, self._step = self._stored()

    def offer(
        self,
        state: TrainState,
        step: int,
        examples_seen: int,
        scores: dict[str, Any],
        frozen_sums: dict[str, str] | None,
    ) -> bool:
        """Save the state if its score is better than all earlier ones. Call it on all processes with the same scores.

        The kept step is deleted only after the better one and its note are complete, so a kill at any moment leaves a step with its
        note. A run that was killed after keeping this very step keeps it again, which completes the files beside it.

        Args:
          state: state after `step`.
          step: number of finished steps.
          examples_seen: training examples consumed up to `step`.
          scores: scores of the evaluation at `step`, by name.
          frozen_sums: checksums of the frozen parameters, see `Checkpoints`.

        Returns:
          Whether this is the kept step.

        Raises:
          Mistake: `scores` lacks the score named by `config.train.best`.
          PlaceFailed: the folder cannot be written.
        """
        value = scores.get(self._name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            numbers = sorted(name for name, value in scores.items() if isinstance(value, float))
            raise Mistake(f"config.train.best: unknown score {self._name!r}; choose one of {', '.join(numbers)}")
        again = step == self._step and value == self._value
        if not (again or self._step is None or self._better(value)):
            return False
        with contextlib.closing(Checkpoints(str(self._folder), keep=2, frozen_sums=frozen_sums)) as checkpoints:
            if not again:
                # Of a killed run, which may have been further: Orbax saves no step before the newest one.
                checkpoints.keep_only([self._step] if self._step is not None and self._step < step else [])
            checkpoints.save(state, step, examples_seen)
            checkpoints.wait()
            if jax.process_index() == 0:
                self._describe(step, value)
            checkpoints.keep_only([step])
        self._value, self._step = value, step
        return True

    def _describe(self, step: int, value: float) -> None:
        """Write the files beside the kept step, the note last."""
        with place_of(self._folder):
            introductions.copy(self._folder.parent, self._folder)
            run_folder.write(self._experiment, self._folder)
            note = {"score": self._name, "value": value, "step": step}
            run_folder.write_whole(self._folder / NOTE, (json.dumps(note) + "\n").encode())

    def _better(self, value: float) -> bool:
        return value > self._value if self._higher else value < self._value

    def _stored(self) -> tuple[float, int | None]:
        """Return (score, step) of the kept checkpoint; (NaN, None) if there is none or it was chosen by another score."""
        try:
            note = json.loads((self._folder / NOTE).read_text(encoding="utf-8"))
            if note["score"] == self._name and note["step"] in steps_of(self._folder):
                return float(note["value"]), int(note["step"])
        except (OSError, ValueError, TypeError, KeyError):  # nothing kept yet, or the process was killed while writing
            pass
        return math.nan, None
