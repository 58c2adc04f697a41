"""Question sets and the answers of systems, as JSON lines.

{"id": "7", "video": "clips/a.mp4", "question": "视频里的人在做什么？", "category": "overall scene"}
{"id": "7", "answer": "他在切菜。"}
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ymplug_jax.core import text_files
from ymplug_jax.core.exits import Mistake

WITHOUT_CATEGORY = "all"


class Question(NamedTuple):
    """One question about one video."""

    id: str
    video: str  # path below the video root
    question: str
    category: str


def read_questions(file: Path) -> list[Question]:
    """Read a question set. "id" may be missing, then it is the number of the line; "category" may be missing.

    Raises:
      Mistake: The file is missing or empty, a line is not such an object, or an id repeats; the message names the line.
    """
    found: dict[str, Question] = {}
    for number, row in _rows(file):
        where = f"{file}, line {number}"
        one = Question(
            _text(row, "id", where, str(number)),
            _text(row, "video", where),
            _text(row, "question", where),
            _text(row, "category", where, WITHOUT_CATEGORY),
        )
        if os.path.isabs(one.video) or ".." in Path(one.video).parts:
            raise Mistake(f"{where}: {one.video!r} is not a path below the video root; remove the leading / and ..")
        if one.id in found:
            raise Mistake(f"{where}: the id {one.id!r} repeats; give each question an id of its own")
        found[one.id] = one
    if not found:
        raise Mistake(f"{file}: no questions in it; write one JSON object per line")
    return list(found.values())


def read_answers(file: Path, questions: Sequence[Question]) -> list[str]:
    """Read the answers of one system, in the order of the questions.

    A line names its question by "id" or, without an id, by "video" and "question". An answer may be empty.

    Raises:
      Mistake: The file is missing, a line is not such an object, a question has no answer or two, or an answer no question.
    """
    by_id = {one.id: place for place, one in enumerate(questions)}
    by_text = _by_text(questions)
    found: dict[int, str] = {}
    for number, row in _rows(file):
        where = f"{file}, line {number}"
        if "id" in row:
            place = by_id.get(_text(row, "id", where))
        else:
            place = by_text.get((_text(row, "video", where), _text(row, "question", where)))
        if place is None:
            raise Mistake(f"{where}: no such question in the question set; answer the same questions with every system")
        if place in found:
            raise Mistake(f"{where}: a second answer to question {questions[place].id!r}; keep one of them")
        if not isinstance(row.get("answer"), str):
            raise Mistake(f'{where}: no text under "answer"; write {{"id": ..., "answer": "..."}}')
        found[place] = " ".join(row["answer"].split())
    if missing := [one.id for place, one in enumerate(questions) if place not in found]:
        raise Mistake(f"{file}: {len(missing)} questions have no answer, the first is {missing[0]!r}; add them")
    return [found[place] for place in range(len(questions))]


def _by_text(questions: Sequence[Question]) -> dict[tuple[str, str], int]:
    """Place of each pair of video and question that occurs once; a pair that occurs twice needs an id."""
    found: dict[tuple[str, str], list[int]] = {}
    for place, one in enumerate(questions):
        found.setdefault((one.video, one.question), []).append(place)
    return {pair: places[0] for pair, places in found.items() if len(places) == 1}


def _rows(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number, object) of each line that is not blank."""
    try:
        lines = text_files.read_lines(file)
    except FileNotFoundError:
        raise Mistake(f"{file}: no such file; correct the path") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            found.append((number, parsed(line, f"{file}, line {number}")))
    return found


def parsed(text: str, where: str) -> dict[str, Any]:
    """Parse one JSON object without repeated names.

    Raises:
      Mistake: It is no such object.
    """

    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise Mistake(f"{where}: the name {twice!r} repeats in one object; keep one of them")
        return dict(pairs)

    try:
        found = json.loads(text, object_pairs_hook=whole)
    except Mistake:
        raise
    except (ValueError, RecursionError) as error:
        raise Mistake(f"{where}: not JSON ({error}); write or export it again") from None
    if not isinstance(found, dict):
        raise Mistake(f"{where}: not a JSON object; write or export it again")
    return found


def _text(row: Mapping[str, Any], name: str, where: str, default: str | None = None) -> str:
    """A text that is not empty; a whole number stands for its digits, because ids are often numbers."""
    value = row.get(name, default)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise Mistake(f'{where}: no text under "{name}"; add it')
    return value.strip()
