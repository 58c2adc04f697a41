"""Sizes of the training records: measured once, and kept in the run's folder.

    data/sizes.npz      size of every record, and the number of examples that one pass over them makes

The file is a cache. It is used if its key fits, which is a hash of the records, the tokenizer, the settings and the version.
"""

import dataclasses
import functools
import hashlib
import io
import json
import logging
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import numpy as np
from etils import epath

from ymplug_jax.core import checkpoint_files, config
from ymplug_jax.core.config import Experiment
from ymplug_jax.data import measuring
from ymplug_jax.data.mixture import Change, whole_weights
from ymplug_jax.data.packing import Packed, Size
from ymplug_jax.data.records import Split
from ymplug_jax.tasks import options
from ymplug_jax.tasks.task import Task
from ymplug_jax.training import environment, run_folder

FOLDER = "data"  # in the folder of a run
FILE = "sizes.npz"
# Settings of the data that do not change the size of a record.
FREE = ("path", "weights", "threads", "workers", "train_split", "eval_split", "examples", "augment", "wrap_uint8")


def room_of(task: Task) -> Size:
    """Return the capacity of an example of a task that packs."""
    assert task.room is not None, "a task with `measure` has `room`"
    return task.room


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured. Two jobs are equal if their keys are, so a program measures once, though several checks ask."""

    key: str
    experiment: Experiment = dataclasses.field(compare=False)
    task: Task = dataclasses.field(compare=False)
    records: Split = dataclasses.field(compare=False)
    workdir: epath.Path | None = dataclasses.field(compare=False)


def key_of(experiment: Experiment, task: Task, prints: Sequence[str]) -> str:
    """Hash of everything that the sizes depend on: records (`prints` of the folders), tokenizer, settings, version."""
    data = config.settings_of(experiment.data)
    tokenizer = data.pop("tokenizer")
    facts = {
        "version": metadata.version("ymplug_jax"),
        "folders": list(prints),
        "task": experiment.task,
        "model": config.settings_of(experiment.model),
        "data": {name: value for name, value in data.items() if name not in FREE},
        "options": config.settings_of(options.build(options.class_of(experiment.task), experiment.options)),
        "tokenizer": environment.digest(checkpoint_files.folder_of(tokenizer)) if tokenizer else "",
        "room": list(room_of(task)),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@functools.lru_cache(maxsize=2)
def measured(job: Job) -> np.ndarray:
    """Return the sizes of all records, int32[records, 3], from the run's folder if they are there."""
    found = _cache(job.workdir)
    if found.get("key") == job.key and len(found["sizes"]) == len(job.records):
        return np.asarray(found["sizes"], np.int32)
    assert job.task.measure is not None
    data = job.experiment.data
    return measuring.measure(
        job.records, job.task.measure, threads=data.threads, workers=data.workers, skip_corrupt=data.skip_corrupt,
        hidden=jax.process_index() != 0,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pass(Job):
    """A pass over the records of a job; its key holds the seed as well."""

    usable: Sequence[np.ndarray] = dataclasses.field(compare=False, default=())
    sizes: np.ndarray = dataclasses.field(compare=False, default_factory=lambda: np.zeros((0, 3), np.int32))


@functools.lru_cache(maxsize=8)
def one_pass(job: Pass) -> int:
    """Return how many examples the records make if each is drawn once: with weights by size, whatever the weights of the run."""
    found = _cache(job.workdir)
    if found.get("pass") == job.key:
        return int(found["examples"])
    counts = [len(own) for own in job.usable]
    natural = Change(0, whole_weights((), counts), 0)
    order = Packed(job.usable, job.sizes, room_of(job.task), job.experiment.train.seed, [natural])
    return order.examples_in(sum(counts))


def _cache(workdir: epath.Path | None) -> dict[str, Any]:
    """Return the content of sizes.npz; {} if it is missing or damaged, which costs time only."""
    if workdir is None or not (file := workdir / FOLDER / FILE).exists():
        return {}
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
        return {name: value.item() if value.ndim == 0 else value for name, value in found.items()}
    except Exception as error:  # numpy and zipfile raise many types
        logging.warning("%s: damaged (%s); the records are measured again", file, error)
        return {}


def write(workdir: epath.Path, key: str, seed: int, sizes: np.ndarray, examples: int) -> None:
    """Write the file, unless it is there.

    Args:
      workdir: folder of the run.
      key: result of `key_of`.
      seed: seed of the run.
      sizes: int32[records, 3].
      examples: result of `one_pass`.
    """
    if _cache(workdir).get("pass") == f"{key} {seed}":
        return
    arrays: dict[str, Any] = {"key": key, "sizes": sizes, "pass": f"{key} {seed}", "examples": examples}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    run_folder.write_whole(workdir / FOLDER / FILE, content.getvalue())
