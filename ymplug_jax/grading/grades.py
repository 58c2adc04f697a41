"""Grades as graders export them from the sheet, checked against its key."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ymplug_jax.core import text_files
from ymplug_jax.core.exits import Mistake
from ymplug_jax.grading.question_sets import parsed
from ymplug_jax.grading.sheets import GRADES, Key

LEAST = 3  # graders
VALUES = {grade: float(value) for value, grade in enumerate(reversed(GRADES))}  # D 0, C 1, B 2, A 3


class Grades(NamedTuple):
    """Grades of every answer on a sheet."""

    graders: tuple[str, ...]
    values: np.ndarray  # f64[G, N] of VALUES; N answers in the order of `Key.names`


def read(files: Sequence[Path], key: Key) -> Grades:
    """Read the files of all graders.

    Raises:
      Mistake: There are fewer than three graders, a file is missing, damaged or of another sheet, a grader appears twice, or an
        answer has no grade, an unknown one or two; the message names the file.
    """
    if len(files) < LEAST:
        raise Mistake(
            f"--grades: {len(files)} files, but agreement needs {LEAST} graders or more; give one file for each"
        )
    seen: dict[str, Path] = {}
    rows = []
    for file in files:
        grader, row = _one(file, key)
        name = " ".join(grader.casefold().split())
        if name in seen:
            raise Mistake(f"{file}: grader {grader!r} is the one of {seen[name]}; give one file for each grader")
        seen[name] = file
        rows.append((grader, row))
    return Grades(tuple(grader for grader, _ in rows), np.array([row for _, row in rows]))


def _one(file: Path, key: Key) -> tuple[str, list[float]]:
    try:
        facts = parsed(text_files.read_text(file), str(file))
    except FileNotFoundError:
        raise Mistake(f"{file}: no such file; give the file that the grader exported") from None
    grader, grades = facts.get("grader"), facts.get("grades")
    if not isinstance(grader, str) or not grader.strip() or not isinstance(grades, dict):
        raise Mistake(f"{file}: no grader or no grades in it; export the grades from the sheet again")
    if facts.get("sheet") != key.sheet:
        raise Mistake(
            f"{file}: grades of sheet {facts.get('sheet')}, but the key is of sheet {key.sheet}; give its own key"
        )
    known = set(key.names)
    if unknown := next((name for name in grades if name not in known), None):
        raise Mistake(f"{file}: the sheet has no answer {unknown!r}; export the grades from the sheet again")
    if missing := [name for name in key.names if name not in grades]:
        raise Mistake(
            f"{file}: {len(missing)} answers have no grade, the first is {missing[0]}; grade them and export again"
        )
    for name, grade in grades.items():
        if not isinstance(grade, str) or grade not in VALUES:
            raise Mistake(f"{file}: {grade!r} of answer {name} is no grade; use {', '.join(GRADES)}")
    return grader.strip(), [VALUES[grades[name]] for name in key.names]
