"""Mixtures and packing in a run: sizes of the records, length of an epoch, history of the weights, and their files in the run's folder.

    data/sizes.npz      sizes of all records, a cache
    data/history.json   what was mixed, and the weights from each example on

The order of a run is a function of both and of the seed. A history entry that starts at or beyond the resumed example belongs to steps
that were lost, and is dropped; so the files need not be written at the same moment as a checkpoint. See docs/mixtures.md.
"""

import dataclasses
import hashlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import measuring, packing
from ymplug_jax.data.mixture import Change, Mixed, Order, whole_weights
from ymplug_jax.data.packing import Packed, Size
from ymplug_jax.data.records import Split
from ymplug_jax.data.source import fingerprint, folders_of, parts_of
from ymplug_jax.tasks.task import Task
from ymplug_jax.training import record_sizes, run_folder

HISTORY = "history.json"


@dataclasses.dataclass(frozen=True)
class Folder:
    """One folder of a mixture."""

    name: str
    fingerprint: str
    records: int
    without_target: int  # records that are never drawn
    unreadable: int  # corrupt records, only with `skip_corrupt`


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a run draws its examples."""

    folders: tuple[Folder, ...]
    usable: tuple[np.ndarray, ...]  # numbers of the records that are drawn, for each folder
    weights: tuple[int, ...]  # whole numbers, see `whole_weights`
    sizes: np.ndarray | None  # int32[records, 3]; None: no packing
    room: Size | None
    apart: bool
    seed: int
    batch: int
    examples: int  # examples of an epoch
    key: str  # of sizes.npz

    def facts(self) -> dict[str, Any]:
        """What must stay the same when a run resumes."""
        sizes = "" if self.sizes is None else hashlib.sha256(self.sizes.tobytes()).hexdigest()
        return {
            "folders": [folder.fingerprint for folder in self.folders],
            "room": list(self.room or ()),
            "window": packing.WINDOW,
            "apart": self.apart,
            "sizes": sizes,
        }

    def change(self, start: int) -> Change:
        """The history entry of the present weights."""
        return Change(start, self.weights, self.batch if self.apart else 0)

    def order(self, changes: Sequence[Change]) -> Order:
        """Return the order of the run."""
        if self.sizes is None or self.room is None:
            return Mixed(self.usable, self.seed, changes, apart=self.apart)
        return Packed(self.usable, self.sizes, self.room, self.seed, changes)

    def counts(self) -> dict[str, float]:
        """Metrics: number of records of each folder that have no target."""
        if self.sizes is None:
            return {}
        return {f"without_target/{folder.name}": float(folder.without_target) for folder in self.folders}

    def text(self) -> str:
        """Describe the mixture, one line for each folder."""
        lines, total = [], sum(self.weights)
        for folder, weight in zip(self.folders, self.weights, strict=True):
            left_out = f", {folder.without_target:,} of them without a target" if self.sizes is not None else ""
            left_out += f", {folder.unreadable:,} unreadable" if folder.unreadable else ""
            lines.append(f"data {folder.name}: {folder.records:,} records{left_out}; share {weight / total:.4f}")
        records = sum(map(len, self.usable))
        if self.sizes is not None and self.room is not None:
            tokens = int(self.sizes[np.concatenate(self.usable), 0].sum(dtype=np.int64))
            lines.append(
                f"packing: {self.examples:,} examples in one pass over {records:,} records, {records / self.examples:.2f} records and "
                f"{tokens / (self.examples * self.room.tokens):.1%} of the {self.room.tokens:,} tokens per example"
            )
        return "\n".join(lines)


def plan(experiment: Experiment, task: Task, records: Split, workdir: epath.Path | None) -> Plan | None:
    """Return how a run draws its examples; None for one folder without packing.

    Args:
      experiment: resolved settings.
      task: the task of the run.
      records: the training split.
      workdir: folder of the run, whose cache of sizes is used if it fits; None: none.

    Raises:
      Mistake: the weights do not fit the folders, a folder has nothing to draw, or a record is larger than an example.
      CorruptRecord: a record is damaged and `skip_corrupt` is not set.
    """
    data, train = experiment.data, experiment.train
    parts = parts_of(records)
    if len(parts) == 1 and task.measure is None:
        if data.weights:
            whole_weights(data.weights, [len(records)])  # raises if there is not one
        return None
    ends = np.cumsum([0, *map(len, parts)])
    prints = tuple(fingerprint(part) for part in parts)
    for number, mark in enumerate(prints):
        if (other := prints.index(mark)) < number:
            raise Mistake(
                f"config.data.path: folders {other + 1} and {number + 1} hold the same records; name one of them, and give it more "
                "weight in config.data.weights"
            )
    key, sizes = "", None
    if task.measure is not None:
        key = record_sizes.key_of(experiment, task, prints)
        sizes = record_sizes.measured(record_sizes.Job(key, experiment, task, records, workdir))
    tokens = np.ones(len(records), np.int64) if sizes is None else sizes[:, 0]
    usable = tuple(begin + np.flatnonzero(tokens[begin:end] > 0) for begin, end in itertools.pairwise(ends))
    left_out = [tokens[begin:end] for begin, end in itertools.pairwise(ends)]
    folders = tuple(
        Folder(name, mark, len(own), int((own == 0).sum()), int((own == measuring.UNREADABLE).sum()))
        for name, mark, own in zip(_names(folders_of(data.path)), prints, left_out, strict=True)
    )
    weights = whole_weights(data.weights, [len(own) for own in usable])
    examples = sum(map(len, usable))
    if sizes is not None:
        measuring.check_room(sizes, record_sizes.room_of(task), records)
        examples = record_sizes.one_pass(
            record_sizes.Pass(f"{key} {train.seed}", experiment, task, records, workdir, usable, sizes)
        )
    return Plan(folders, usable, weights, sizes, task.room, task.apart, train.seed, train.batch_size, examples, key)


def _names(folders: Sequence[str]) -> list[str]:
    """Return the last parts of the paths, or the whole paths if two are alike."""
    short = [PurePosixPath(folder).name for folder in folders]
    return short if len(set(short)) == len(short) else list(folders)


@dataclasses.dataclass(frozen=True)
class Begun:
    """The order of a run that starts or resumes, and what its folder records about it."""

    plan: Plan
    changes: tuple[Change, ...]
    order: Order


def write(begun: Begun | None, workdir: epath.Path) -> None:
    """Write both files, on one process, once the run has passed its checks; nothing for one folder without packing."""
    if begun is None:
        return
    plan, folder = begun.plan, workdir / record_sizes.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    if plan.sizes is not None:
        record_sizes.write(workdir, plan.key, plan.seed, plan.sizes, plan.examples)
    history = {**plan.facts(), "history": [list(change) for change in begun.changes]}
    run_folder.write_whole(folder / HISTORY, (json.dumps(history, indent=1) + "\n").encode())


def begin(plan: Plan | None, workdir: epath.Path, seen: int) -> Begun | None:
    """Return the order of a run from example `seen` on; None for one folder without packing. Writes nothing.

    Raises:
      Mistake: the run cannot resume with these data, or the processes see different data.
    """
    changes = check(plan, workdir, seen)
    if plan is None:
        return None
    _check_alike(plan, changes)
    if jax.process_index() == 0:
        logging.info("%s", plan.text())
        for before, after in itertools.pairwise(changes):
            if after.start == seen:
                logging.warning("weights of the data from example %d on: %s", seen, _difference(plan, before, after))
    order = plan.order(changes)
    order(seen)  # finds the first example now, so that worker processes need not
    return Begun(plan, changes, order)


def _difference(plan: Plan, before: Change, after: Change) -> str:
    parts = [
        f"{folder.name} {old / sum(before.weights):.4f} -> {new / sum(after.weights):.4f}"
        for folder, old, new in zip(plan.folders, before.weights, after.weights, strict=True)
    ]
    return ", ".join(parts)


def check(plan: Plan | None, workdir: epath.Path, seen: int) -> tuple[Change, ...]:
    """Return the history of the weights for a run that goes on from example `seen`, the present ones included.

    Raises:
      Mistake: the run cannot resume with these data.
    """
    file = workdir / record_sizes.FOLDER / HISTORY
    if not seen:
        return () if plan is None else (plan.change(0),)
    stored = _history(file)
    other = "or choose another --workdir and set config.train.init_from to this folder"
    if plan is None:
        if stored:
            raise Mistake(
                f"config.data.path: the run in {workdir} draws from {len(stored['folders'])} folders or packs records, so its examples cannot "
                f"be continued from one folder without packing; name the same folders, {other}"
            )
        return ()
    if not stored:
        raise Mistake(
            f"config.data.path: the run in {workdir} was begun with one folder and without packing, so its examples cannot be continued; "
            f"name that folder alone, {other}"
        )
    facts = plan.facts()
    if facts["folders"] != stored["folders"]:
        raise Mistake(
            f"config.data.path: {_other_folder(plan, stored['folders'])} the run in {workdir}, so its examples cannot be continued; name the "
            f"same folders in the same order, {other}"
        )
    if facts["room"] != stored["room"]:
        raise Mistake(
            f"config.data.max_tokens: an example has room for {facts['room']} tokens, images and videos, but for {stored['room']} in the "
            f"run in {workdir}; set config.data.max_tokens and config.options back, or choose another --workdir"
        )
    if facts != {name: stored.get(name) for name in facts}:
        raise Mistake(
            f"config.data: the sizes of the records are not those of the run in {workdir}, so its examples cannot be continued; set "
            "config.data and config.options back, or choose another --workdir"
        )
    kept = tuple(change for change in stored["history"] if change.start < seen)
    now = plan.change(seen)
    return kept if kept and kept[-1][1:] == now[1:] else (*kept, now)


def _other_folder(plan: Plan, before: Sequence[str]) -> str:
    if len(before) != len(plan.folders):
        return f"the number of folders is {len(plan.folders)}, but {len(before)} in"
    i = next(i for i, folder in enumerate(plan.folders) if folder.fingerprint != before[i])
    return f"folder {i + 1}, {plan.folders[i].name}, has other records than folder {i + 1} of"


def _history(file: epath.Path) -> dict[str, Any]:
    """Return the content of history.json with its history as changes; {} if there is none.

    Raises:
      Mistake: the file is damaged.
    """
    if not file.exists():
        return {}
    try:
        stored: dict[str, Any] = json.loads(file.read_bytes())
        changes = [
            Change(int(start), tuple(map(int, weights)), int(batch)) for start, weights, batch in stored["history"]
        ]
        if not changes or changes[0].start or {"folders", "room"} - stored.keys():
            raise ValueError("incomplete")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Mistake(
            f"{file}: damaged ({error}), so the order of the examples is unknown; restore a copy, or choose another --workdir"
        ) from None
    return {**stored, "history": changes}


def _check_alike(plan: Plan, changes: Sequence[Change]) -> None:
    """Check that all processes draw the same examples.

    Raises:
      Mistake: one of them has other data, settings or files.
    """
    if jax.process_count() == 1:
        return
    content: Mapping[str, Any] = {**plan.facts(), "history": changes, "seed": plan.seed, "examples": plan.examples}
    digest = hashlib.sha256(json.dumps(content).encode()).digest()[:8]
    found = np.asarray(multihost_utils.process_allgather(np.frombuffer(digest, np.int32)))
    if other := [i for i in range(len(found)) if (found[i] != found[0]).any()]:
        raise Mistake(
            f"config.data.path: process {other[0]} finds other records or sizes than process 0; give all hosts the same data and settings"
        )
