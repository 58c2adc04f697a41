"""Which tasks there are. Whatever has a `make` below `tasks/FAMILY/` is one."""

import importlib
from pathlib import Path
from types import ModuleType

from ymplug_jax.core.exits import Mistake
from ymplug_jax.tasks.presentation import Score


def modules() -> dict[str, str]:
    """Dotted module by task name. A task of `mplug_video/` is called by its file's name, one of another family FAMILY_FILE.

    What a family's tasks share lies beside them and has no `make`; it is listed here all the same, see `module_of`.
    """
    files = [
        p for p in sorted(Path(__file__).parent.glob("*/*.py")) if p.parent.name != "common" and p.stem != "__init__"
    ]
    names = {p: p.stem if p.parent.name == "mplug_video" else f"{p.parent.name}_{p.stem}" for p in files}
    return {name: f"{__package__}.{p.parent.name}.{p.stem}" for p, name in names.items()}


def module_of(task: str) -> ModuleType:
    """The file of a task.

    Raises:
      Mistake: no such task; the message lists all.
    """
    found = modules()
    if task in found and hasattr(made := importlib.import_module(found[task]), "make"):
        return made
    raise Mistake(f"config.task is {task!r}; there are {', '.join(tasks())}")


def tasks() -> dict[str, ModuleType]:
    """The files of all tasks by name, sorted."""
    every = {name: importlib.import_module(dotted) for name, dotted in sorted(modules().items())}
    return {name: module for name, module in every.items() if hasattr(module, "make")}


def scores_of(task: str) -> tuple[Score, ...]:
    """All scores that evaluations of a task may have, and after them those of all others: a run may be of another version."""
    every = {name: tuple(getattr(module, "SCORES", ())) for name, module in tasks().items()}
    found = {score.name: score for score in every.get(task, ())}
    for score in (score for scores in every.values() for score in scores):
        found.setdefault(score.name, score)
    return tuple(found.values())


def answering(command: str) -> list[str]:
    """The tasks whose runs answer a command of `predict`."""
    return [name for name, module in tasks().items() if command in getattr(module, "ANSWERS", ())]
