"""What a run was doing when it was killed, told by its folder."""

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from ymplug_jax.core.checkpoint_files import COMMITTED

STEPS, EVALUATE = 24, 2  # length of the runs of `kills`, and steps between their evaluations
SAVING, FIRST, BEST, FROZEN = "a save", "the first save", "a write of best/", "the write of frozen parameters"
START, TRAIN, CHECK, END = "start-up", "a training step", "an evaluation", "the end, after the last evaluation"
PHASES = (START, FROZEN, TRAIN, CHECK, FIRST, SAVING, BEST, END)


class Seen(NamedTuple):
    """A run's folder at one moment."""

    unfinished: dict[str, set[Any]]  # kind of write -> its temporary folders
    steps: set[int]  # complete checkpoints
    best: tuple[list[int], int | None]  # steps in best/, and the step that best.json names
    lines: list[str]  # of metrics.jsonl


def look(workdir: epath.Path) -> Seen:
    """Describe the folder, without changing it."""
    checkpoints = {"": workdir / "checkpoints", BEST: workdir / "best" / "checkpoints"}
    unfinished = {
        SAVING: _unfinished(checkpoints[""] / "steps"),
        BEST: _unfinished(checkpoints[BEST] / "steps"),
        FROZEN: _unfinished(checkpoints[""]),
    }
    steps, in_best = (sorted(_complete(folder / "steps")) for folder in checkpoints.values())
    note = None
    with contextlib.suppress(OSError, ValueError):
        note = json.loads((workdir / "best" / "best.json").read_text())["step"]
    return Seen(unfinished, set(steps), (in_best, note), lines_of(workdir))


def lines_of(workdir: epath.Path) -> list[str]:
    """Lines of metrics.jsonl that end."""
    file = workdir / "metrics.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def _entries(folder: epath.Path) -> list[epath.Path]:
    try:
        return [*folder.iterdir()] if folder.exists() else []
    except FileNotFoundError:
        return []


def _committed(folder: epath.Path) -> bool:
    """Whether Orbax has finished a folder: it renames local folders, and marks those in a bucket."""
    if "://" in str(folder):
        return (folder / COMMITTED).exists()
    return "tmp" not in folder.name


def _complete(folder: epath.Path) -> list[int]:
    return [int(entry.name) for entry in _entries(folder) if entry.name.isdigit() and _committed(entry)]


def _unfinished(folder: epath.Path) -> set[Any]:
    """Temporary folders of saves, with what distinguishes those of two starts."""
    found = set()
    for entry in _entries(folder):
        ours = entry.name == "frozen" or entry.name.isdigit() or "tmp" in entry.name
        if not ours or _committed(entry):
            continue
        with contextlib.suppress(OSError):
            if "://" in str(entry):
                found.add((entry.name, len(_entries(entry))))
            else:
                found.add((entry.name, Path(entry).stat().st_ino, Path(entry).stat().st_mtime_ns))
    return found


def phase(before: Seen, after: Seen) -> str:
    """What a start was doing when it was killed, from the run's folder before the start and after the kill."""
    new = {kind for kind, folders in after.unfinished.items() if folders - before.unfinished[kind]}
    in_best, note = after.best
    if BEST in new or (after.best != before.best and in_best != [note]):
        return BEST
    if SAVING in new:
        return SAVING if after.steps else FIRST
    if FROZEN in new:
        return FROZEN
    if len(after.lines) == len(before.lines):
        return START
    line = json.loads(after.lines[-1])
    evaluated = any(key.startswith("eval/") for key in line)
    if line["step"] == STEPS and evaluated:
        return END
    due = line["step"] % EVALUATE == 0 or line["step"] == STEPS
    return CHECK if due and not evaluated else TRAIN
