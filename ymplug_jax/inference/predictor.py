"""A checkpoint on one device, compiled to answer about clips and texts."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import cv2
import jax
import numpy as np
from etils import epath

from ymplug_jax.core import checkpoint_files, config, state, stored_params
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.inference.settings import Source
from ymplug_jax.inference.wording import shown
from ymplug_jax.tasks import options
from ymplug_jax.tasks.presentation import Answer
from ymplug_jax.tasks.task import Batch, Example, Row, Task
from ymplug_jax.training import evaluate, preflight, setup

BATCH = 8


class Predictor:
    """The task and model of a checkpoint. Creating it checks the settings; `load` reads the weights and compiles."""

    def __init__(self, source: Source):
        """Check the settings and make the abstract model; no weights are read.

        Args:
          source: folder, settings, tokenizer and class names, see `ymplug_jax.inference.settings`.

        Raises:
          Mistake: settings that contradict each other, or converted parameters that do not fit the model of the settings.
        """
        self.folder, self.whole_lines, self.introduction = source.folder, source.whole_lines, source.introduction
        self._local = tempfile.TemporaryDirectory(prefix="ymplug_jax_")
        data = dataclasses.replace(
            source.experiment.data,
            path="",
            examples=BATCH,
            tokenizer=self._copy(source.tokenizer, "tokenizer"),
            classes=self._copy(source.classes, "classes"),
        )
        train = dataclasses.replace(source.experiment.train, batch_size=BATCH, accumulate=1, init_from="")
        asked = dataclasses.replace(source.experiment, data=data, train=train, mesh=config.Mesh())
        self.experiment = options.for_predict(asked)
        try:
            self._run = setup.prepare(self.experiment, jax.devices()[:1])
            if source.converted:  # a run was compared with its settings when it began
                stored_params.load_params(str(self.folder), self._abstract, values=False)
                if not train.other_tokenizer:
                    preflight.check_words(self.experiment, str(self.folder))
        except (ValueError, FileNotFoundError) as error:
            text = str(error).replace(data.tokenizer, str(source.tokenizer)) if data.tokenizer else str(error)
            raise Mistake(f"{self.folder}: {text}") from None
        self._params: Params | None = None
        self._ready: Callable[[Params, Example], dict[str, jax.Array]] | None = None

    @property
    def task(self) -> Task:
        """The task of the settings."""
        return self._run.task

    @property
    def _abstract(self) -> Params:
        """All parameters as ShapeDtypeStructs."""
        return state.merge(self._run.state.trainable, self._run.frozen)

    def params(self) -> Params:
        """All parameters on the device, read at the first call.

        Raises:
          Mistake: the weights are missing, damaged, or do not fit the settings.
        """
        if self._params is None:
            try:
                self._params = evaluate.load(self._run, self.folder)
            except (checkpoint_files.CheckpointError, FileNotFoundError) as error:
                raise Mistake(f"{self.folder}: {error}") from None
        return self._params

    def tracing(self) -> AbstractContextManager[None]:
        """Context in which programs of this checkpoint are compiled and run, see `Run.tracing`."""
        return self._run.tracing()

    def load(self) -> tuple[Params, Callable[[Params, Example], dict[str, jax.Array]]]:
        """(parameters, compiled predictions). Both are kept after the first call.

        Raises:
          Mistake: as `params`.
        """
        params = self.params()
        if self._ready is None:
            with self.tracing():
                self._ready = jax.jit(self._predict).lower(params, self._batch([blank("")])).compile()
        return params, self._ready

    def rows(self, records: Sequence[Record]) -> list[Row]:
        """The task's predictions for each record, in order: arrays without a leading axis B.

        The predictions of a record do not depend on the rest of its batch. The last batch is padded, so that one compiled program
        serves any number of records.
        """
        params, predict = self.load()
        rows = []
        for start in range(0, len(records), BATCH):
            part = records[start : start + BATCH]
            found = jax.device_get(predict(params, self._batch(part)))
            rows += [{key: value[i] for key, value in found.items()} for i in range(len(part))]
        return rows

    def answers(self, command: str, records: Sequence[Record], best: int) -> Iterator[Answer]:
        """Yield the answer of the task about each record.

        Args:
          command: of `ymplug_jax.predict` that the task answers: "classify" or "caption".
          records: of the clips.
          best: number of classes in an answer.

        Raises:
          Mistake: a prediction is not finite.
        """
        about = self.task.describe[command]
        for row, record in zip(self.rows(records), records, strict=True):
            for values in row.values():
                if jax.numpy.issubdtype(values.dtype, np.floating):
                    _check_finite(values, record.media_id)
            yield about(row, record, best)

    def cut(self, texts: Sequence[str]) -> list[tuple[str, int, int]]:
        """(text, number of its tokens, how many of them the model reads) of the texts that are too long for it."""
        if self.task.lengths is None:
            return []
        found = [(text, *self.task.lengths(blank(text))) for text in texts]
        return [(text, tokens, read) for text, tokens, read in found if read < tokens]

    def check_questions(self, questions: Sequence[str], name: str) -> None:
        """Check that the model reads whole questions.

        Args:
          questions: the questions.
          name: of the argument that holds them, for the message.

        Raises:
          Mistake: a question has more tokens than the model reads.
        """
        for text, tokens, read in self.cut(questions):
            raise Mistake(
                f"{name} {text!r}: has {tokens} tokens, of which this run reads {read} "
                f"(config.data.max_tokens {self.experiment.data.max_tokens}); ask in fewer words"
            )

    def embed_records(self, records: Sequence[Record]) -> np.ndarray:
        """Unit vectors of clips, f32[N, E].

        Raises:
          Mistake: a vector is not finite.
        """
        return self._vectors("video", records, [record.media_id for record in records])

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, f32[N, E].

        Raises:
          Mistake: a vector is not finite.
        """
        return self._vectors("text", [blank(text) for text in texts], texts)

    def _vectors(self, side: str, records: Sequence[Record], names: Sequence[str]) -> np.ndarray:
        if not records:
            found = jax.eval_shape(self._predict, self._abstract, self._batch([blank("")]))
            return np.zeros((0, found[side].shape[-1]), np.float32)
        rows = self.rows(records)
        return np.stack([_check_finite(row[side], name) for row, name in zip(rows, names, strict=True)])

    def _predict(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """The task's predictions without those that only an evaluation needs."""
        assert self.task.predict is not None
        return {name: value for name, value in self.task.predict(params, batch).items() if name not in self.task.kept}

    def _batch(self, records: Sequence[Record]) -> Example:
        # Only training compares the names of clips, and a file's name may hold bytes that are not UTF-8.
        records = [record._replace(media_id="") for record in records]
        examples = [self.task.one(record, None) | {"valid": np.array(True)} for record in records]
        examples += [examples[0] | {"valid": np.array(False)}] * (BATCH - len(records))
        return {key: np.stack([example[key] for example in examples]) for key in examples[0]}

    def _copy(self, file: epath.Path | None, folder: str) -> str:
        """Path of a local copy that lives as long as this object, "" for None. The file may be in a bucket; tokenizers are read locally."""
        if file is None:
            return ""
        copy = Path(self._local.name) / folder / file.name
        copy.parent.mkdir()
        copy.write_bytes(file.read_bytes())
        return str(copy)


def blank(text: str) -> Record:
    """A record with this text and one black frame, which the text tower does not see."""
    black = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    return Record("", [black], np.zeros(1, np.int64), text, [], "", -1)


def _check_finite(values: np.ndarray, name: str) -> np.ndarray:
    """Return the values if all of them are finite.

    Raises:
      Mistake: one of them is not finite.
    """
    if not np.isfinite(values).all():
        raise Mistake(
            f"{shown(name)}: the model's scores are not finite; this checkpoint is broken, use an earlier one"
        )
    return values
