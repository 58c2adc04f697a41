"""Lookup of tasks by name. Every module `tasks/FAMILY/*.py` that defines `make` is a task."""

import importlib
from pathlib import Path
from types import ModuleType

from ymplug_jax.core.exits import Mistake
from ymplug_jax.tasks.presentation import Score


def modules() -> dict[str, str]:
    """Map each task name to its dotted module, without importing any.

    A task in `mplug_video/` is named after its file; a task of any other family is named FAMILY_FILE. The result includes
    a family's shared modules, which define no `make`; `module_of` rejects those.
    """
    files = [
        p for p in sorted(Path(__file__).parent.glob("*/*.py")) if p.parent.name != "common" and p.stem != "__init__"
    ]
    names = {p: p.stem if p.parent.name == "mplug_video" else f"{p.parent.name}_{p.stem}" for p in files}
    return {name: f"{__package__}.{p.parent.name}.{p.stem}" for p, name in names.items()}


def module_of(task: str) -> ModuleType:
    """Import the module of a task.

    Raises:
      Mistake: The task does not exist; the message lists all tasks.
    """
    found = modules()
    if task in found and hasattr(made := importlib.import_module(found[task]), "make"):
        return made
    raise Mistake(f"config.task: unknown task {task!r}; choose one of {', '.join(tasks())}")


def tasks() -> dict[str, ModuleType]:
    """The modules of all tasks, sorted by task name."""
    every = {name: importlib.import_module(dotted) for name, dotted in sorted(modules().items())}
    return {name: module for name, module in every.items() if hasattr(module, "make")}


def scores_of(task: str) -> tuple[Score, ...]:
    """Scores of a task, followed by those of all other tasks: scores.json of an older version may name any of them."""
    every = {name: tuple(getattr(module, "SCORES", ())) for name, module in tasks().items()}
    found = {score.name: score for score in every.get(task, ())}
    for score in (score for scores in every.values() for score in scores):
        found.setdefault(score.name, score)
    return tuple(found.values())


def answering(command: str) -> list[str]:
    """Names of the tasks whose runs support a command of `predict`."""
    return [name for name, module in tasks().items() if command in getattr(module, "ANSWERS", ())]
