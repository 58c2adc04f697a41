"""A run's newest checkpoint on one device, ready to answer about clips."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import jax
import numpy as np
from etils import epath

from ymplug_jax.core import checkpoint_files, config
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.tasks import names, options
from ymplug_jax.tasks.task import Batch, Example, Row, Task
from ymplug_jax.training import evaluate, run_folder, setup

BATCH = 8


class Predictor:
    """Settings are checked when it is made, before any video is decoded; `load` reads the weights and compiles."""

    def __init__(self, name: str, command: str):
        """Read the settings of a run and lay its model out.

        Args:
          name: the run's folder, local or gs://.
          command: of `ymplug_jax.predict`.

        Raises:
          Mistake: no run with a checkpoint there, a run of another task, damaged settings, or a part of the run is missing.
        """
        self.folder = checkpoint_files.folder_of(name)
        experiment = _settings(self.folder)
        if experiment.task not in (able := names.answering(command)):
            wanted = " or ".join(able)
            raise Mistake(f"{self.folder} is a run of task {experiment.task!r}; {command} needs one of {wanted}")
        if checkpoint_files.latest_step(str(self.folder)) is None:
            raise Mistake(f"{self.folder}: this run has no checkpoint yet; train it until its first save")
        self._local = tempfile.TemporaryDirectory(prefix="ymplug_jax_")
        data = dataclasses.replace(
            experiment.data, path="", examples=BATCH, tokenizer=self._tokenizer(experiment), classes=self._classes(experiment)
        )  # fmt: skip
        train = dataclasses.replace(experiment.train, batch_size=BATCH, accumulate=1, init_from="")
        asked = dataclasses.replace(experiment, data=data, train=train, mesh=config.Mesh())
        self.experiment = options.for_predict(asked)
        try:
            self._run = setup.prepare(self.experiment, jax.devices()[:1])
        except (ValueError, FileNotFoundError) as error:
            raise Mistake(f"{self.folder}: {error}") from None
        self._ready: tuple[Params, Callable[[Params, Example], dict[str, jax.Array]]] | None = None

    @property
    def task(self) -> Task:
        """The run's task."""
        return self._run.task

    def load(self) -> tuple[Params, Callable[[Params, Example], dict[str, jax.Array]]]:
        """The weights and the compiled predictions; both are kept.

        Raises:
          Mistake: weights that are missing or do not fit the run's settings.
        """
        if self._ready is None:
            try:
                params = evaluate.load(self._run, self.folder)
            except (checkpoint_files.CheckpointError, FileNotFoundError) as error:
                raise Mistake(f"{self.folder}: {error}") from None
            with self._run.tracing():
                made = jax.jit(self._predict).lower(params, self._batch([blank("")])).compile()
            self._ready = params, made
        return self._ready

    def _predict(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """The task's predictions but for those that only an evaluation needs."""
        assert self.task.predict is not None
        return {name: value for name, value in self.task.predict(params, batch).items() if name not in self.task.kept}

    def rows(self, records: Sequence[Record]) -> list[Row]:
        """Predictions of the task for each record, in order: arrays without a leading axis B.

        A record's predictions do not depend on the others: rows of a batch are computed apart, and a last batch that is not
        full is padded, so that one compiled program serves all.
        """
        params, predict = self.load()
        rows = []
        for start in range(0, len(records), BATCH):
            part = records[start : start + BATCH]
            found = jax.device_get(predict(params, self._batch(part)))
            rows += [{key: value[i] for key, value in found.items()} for i in range(len(part))]
        return rows

    def _batch(self, records: Sequence[Record]) -> Example:
        # Names tell records of one clip apart in training alone, and those of files may hold bytes that are no text.
        records = [record._replace(media_id="") for record in records]
        examples = [self.task.example(record, None) | {"valid": np.array(True)} for record in records]
        examples += [examples[0] | {"valid": np.array(False)}] * (BATCH - len(records))
        return {key: np.stack([example[key] for example in examples]) for key in examples[0]}

    def _tokenizer(self, experiment: Experiment) -> str:
        """The run's own copy: the file that the settings name may be gone, or another by now."""
        if not experiment.data.tokenizer:
            return ""
        kept = self.folder / run_folder.TOKENIZER / epath.Path(experiment.data.tokenizer).name
        if not kept.is_file():
            raise Mistake(
                f"{kept}: the run's copy of its tokenizer is missing; put the file there that the run was trained with"
            )
        return self._copy(kept)

    def _classes(self, experiment: Experiment) -> str:
        kept = self.folder / run_folder.CLASSES
        if kept.is_file():
            return self._copy(kept)
        if experiment.data.classes:
            raise Mistake(
                f"{kept}: the run's class names are missing; put the file there that the run was trained with"
            )
        return ""

    def _copy(self, file: epath.Path) -> str:
        """The file on this machine for as long as this object lives: the run may be in a bucket, tokenizers read local files."""
        copy = Path(self._local.name) / file.name
        copy.write_bytes(file.read_bytes())
        return str(copy)


def blank(text: str) -> Record:
    """A record with this text and a black picture: the text tower does not look at it."""
    black = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    return Record("", [black], np.zeros(1, np.int64), text, [], "", -1)


def _settings(folder: epath.Path) -> Experiment:
    """The settings that a run keeps in its folder.

    Raises:
      Mistake: no run's folder, named with what it is instead, or settings that cannot be read.
    """
    asked = "--checkpoint is the --workdir of a run"
    try:
        there = (folder / run_folder.CONFIG).exists()
    except OSError as error:
        raise Mistake(f"{folder}: cannot be read ({error.strerror or error}); look at its permissions") from None
    if not there:
        if folder.exists() and not folder.is_dir():
            raise Mistake(f"{folder}: a file; {asked}, which is a folder")
        if not folder.exists():
            raise Mistake(f"{folder}: no config.json here, there is no such folder; {asked}")
        if (folder / "checkpoints" / checkpoint_files.CONVERTED).exists():
            raise Mistake(
                f"{folder}: a converted checkpoint has no config.json and answers nothing yet; fine-tune it with "
                "--config.train.init_from and give the --workdir of that run"
            )
        seeds = sorted(part.name for part in folder.iterdir() if (part / run_folder.CONFIG).exists())
        if seeds:
            raise Mistake(f"{folder}: no config.json here, but runs {', '.join(seeds)}; {asked}, give one of them")
        above = next((place for place in folder.parents if (place / run_folder.CONFIG).exists()), None)
        hint = f"; {above} is one" if above else ""
        raise Mistake(f"{folder}: no config.json here; {asked}{hint}")
    return run_folder.read_settings(folder)
