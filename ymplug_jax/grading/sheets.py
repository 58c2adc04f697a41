"""Blind grading sheets: one HTML file for the graders, and the key that says which system gave which answer.

Graders see every different answer to a question once. The order of the answers depends on the seed and on the texts of the answers
only, so the page is the same whichever system gave which answer, and nothing in it can tell them apart.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ymplug_jax.core import text_files
from ymplug_jax.core.exits import Mistake
from ymplug_jax.grading.question_sets import Question, parsed
from ymplug_jax.reports import evaluation_report

FORMAT = "ymplug_jax grading key 1"
# Grade -> what it means, after Self-Instruct.
GRADES = {
    "A": "准确而令人满意 · valid and satisfying",
    "B": "基本正确，略有瑕疵 · acceptable, with minor errors or imperfections",
    "C": "切题，但有明显错误 · on topic, with significant errors",
    "D": "无关或错误 · irrelevant or wrong",
}


class Entry(NamedTuple):
    """One answer on the sheet."""

    answer: str
    systems: tuple[str, ...]  # all systems that gave it


class Key(NamedTuple):
    """What a sheet shows, and which system gave which answer."""

    sheet: str  # fingerprint of what the graders see
    seed: str
    systems: tuple[str, ...]
    questions: tuple[Question, ...]
    entries: tuple[tuple[Entry, ...], ...]  # of each question, in the order of the sheet

    @property
    def names(self) -> list[str]:
        """Name of every answer on the sheet: QUESTION/PLACE, counted from 1."""
        return [
            f"{one.id}/{place}"
            for one, own in zip(self.questions, self.entries, strict=True)
            for place in range(1, len(own) + 1)
        ]


def new_seed() -> str:
    """A random seed."""
    return secrets.token_hex(16)


def blind(questions: Sequence[Question], answers: Mapping[str, Sequence[str]], seed: str) -> Key:
    """Order the answers of every question by the seed.

    Args:
      questions: The question set.
      answers: Answers of each system, in the order of the questions.
      seed: Any text; the same seed gives the same sheet.

    Raises:
      Mistake: There are fewer than two systems.
    """
    if len(answers) < 2:
        raise Mistake("--system: only one system; give two or more to compare")
    entries = []
    for place, question in enumerate(questions):
        by_text: dict[str, list[str]] = {}
        for system, own in answers.items():
            by_text.setdefault(own[place], []).append(system)
        order = sorted(by_text, key=lambda text: _digest(seed, question.id, text))
        entries.append(tuple(Entry(text, tuple(by_text[text])) for text in order))
    shown = [[*question, *(entry.answer for entry in own)] for question, own in zip(questions, entries, strict=True)]
    sheet = _digest(json.dumps(shown, ensure_ascii=False))[:16]
    return Key(sheet, seed, tuple(answers), tuple(questions), tuple(entries))


def _digest(*texts: str) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def page(key: Key, frames: Mapping[str, Sequence[str]]) -> str:
    """The sheet as one HTML file that needs nothing else.

    Args:
      key: The sheet.
      frames: Data URIs of the frames of each video.
    """
    videos: dict[str, list[dict[str, Any]]] = {}
    for number, (question, own) in enumerate(zip(key.questions, key.entries, strict=True), 1):
        named = [(f"{question.id}/{place}", entry.answer) for place, entry in enumerate(own, 1)]
        card = {"number": number, "question": question.question, "category": question.category, "answers": named}
        videos.setdefault(question.video, []).append(card)
    return evaluation_report.render(
        "grading_sheet.html",
        sheet=key.sheet,
        grades=GRADES,
        videos=[(frames[video], cards) for video, cards in videos.items()],
        questions=len(key.questions),
        answers=len(key.names),
    )


def as_json(key: Key) -> str:
    """The key as the text of its file."""
    questions = [
        {**question._asdict(), "answers": [{"text": entry.answer, "systems": entry.systems} for entry in own]}
        for question, own in zip(key.questions, key.entries, strict=True)
    ]
    facts = {"format": FORMAT, "sheet": key.sheet, "seed": key.seed, "systems": key.systems, "questions": questions}
    return json.dumps(facts, ensure_ascii=False, indent=1) + "\n"


def read_key(file: Path) -> Key:
    """Read the file that `as_json` describes.

    Raises:
      Mistake: It is missing or damaged, or of another format.
    """
    try:
        facts = parsed(text_files.read_text(file), str(file))
    except FileNotFoundError:
        raise Mistake(f"{file}: no such file; give the key that was written with the sheet") from None
    if facts.get("format") != FORMAT:
        raise Mistake(f"{file}: not a key of a grading sheet; give the key that was written with the sheet")
    try:
        questions = [Question(*(str(one[name]) for name in Question._fields)) for one in facts["questions"]]
        answers = {
            str(system): [_answer_of(one["answers"], system) for one in facts["questions"]]
            for system in facts["systems"]
        }
        key = blind(questions, answers, str(facts["seed"]))
    except (KeyError, TypeError, StopIteration):
        raise Mistake(f"{file}: damaged; make sheet and key again with the same --seed") from None
    if key.sheet != facts["sheet"]:
        raise Mistake(f"{file}: damaged, its answers are not those of sheet {facts['sheet']}; make sheet and key again")
    return key


def _answer_of(answers: Sequence[Mapping[str, Any]], system: str) -> str:
    return next(str(one["text"]) for one in answers if system in one["systems"])
