"""Questions and answers about the clips of `chat_clips`, as rows of instruct files (JSON lines).

A row is {"video": [FILE], "text": CONVERSATION, "prompt": INTRODUCTION, "task_type": KIND_sft}; KIND is that of the last question.
Rows of still images have "image" instead of "video". Rows of text have neither: a title stands in place of the clip.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.chat_clips import ChatClip, still_of

IMAGE_EVERY = TEXT_EVERY = 12  # one training clip of so many has a row of a still image besides, and one a row of text
MOST_TURNS = 3  # in a training row
# Replaces the English introduction of the large model, which takes a hundred tokens of a small tokenizer.
INTRODUCTION = "看一看，答一答。"

COLOUR = ("它是什么颜色的？", "画面里的图案是什么颜色？", "视频中出现的是哪种颜色？")
SHAPE = ("它是什么形状？", "画面里的图形是什么形状？", "视频中出现了哪种图形？")
MOTION = ("它在怎样移动？", "画面里的图形在做什么？", "图形朝哪个方向走？")
FIRST = ("它先怎样移动？", "图形一开始在做什么？", "画面里的图形起初朝哪个方向走？")
THEN = ("它后来怎样移动？", "图形最后在做什么？", "画面里的图形接着朝哪个方向走？")
NUMBER = ("画面上写的数字是几？", "视频里出现了哪个数字？", "图中的数字是多少？")

SCENE = ("视频里有什么？", "请描述这段视频。", "这段视频讲了什么？")


class Question(NamedTuple):
    """A question about a clip: its kind, the ways to ask it and the only answer."""

    kind: str
    phrasings: tuple[str, ...]
    answer: str


def questions_of(clip: ChatClip, *, still: bool = False) -> list[Question]:
    """All questions about a clip; `still`: those that one frame of it answers."""
    asked = [Question("colour", COLOUR, clip.colour)]
    if clip.number is not None:
        return [*asked, Question("number", NUMBER, str(clip.number))]
    asked.append(Question("shape", SHAPE, clip.shape))
    if still:
        return asked
    if len(clip.motions) == 1:
        return [*asked, Question("motion", MOTION, clip.motions[0])]
    return [*asked, Question("order", FIRST, clip.motions[0]), Question("order", THEN, clip.motions[1])]


def scene_of(clip: ChatClip) -> Question:
    """The question for everything that a clip shows; its title is the answer."""
    return Question("scene", SCENE, clip.title)


def conversation_row(field: str, file: str, first: str, turns: list[tuple[str, Question]]) -> dict[str, object]:
    """A row of an instruct file.

    Args:
      field: "video", "image" or "" in a row of text.
      file: that the field names, relative to the video root.
      first: what the first line shows: a placeholder or a title.
      turns: (phrasing, question) of each turn.
    """
    lines = [f"Human: {first}"]
    for phrasing, question in turns:
        lines += [f"Human: {phrasing}", f"AI: {question.answer}"]
    media = {field: [file]} if field else {}
    return {**media, "text": "\n".join(lines), "prompt": INTRODUCTION, "task_type": f"{turns[-1][1].kind}_sft"}


def training_rows(clips: list[ChatClip], seed: int) -> list[dict[str, object]]:
    """A row of each clip with up to three turns; some clips have another one about a frame of them or about their title."""
    rng = np.random.default_rng((seed, 5))
    rows = []
    for i, clip in enumerate(clips):
        asked = [*questions_of(clip), scene_of(clip)]
        rows.append(conversation_row("video", clip.file, "<|video|>", _turns(asked, rng)))
        if i % IMAGE_EVERY == 0:
            turns = _turns(questions_of(clip, still=True), rng)
            rows.append(conversation_row("image", still_of(clip.file), "<image>", turns))
        if i % TEXT_EVERY == TEXT_EVERY // 2:
            rows.append(conversation_row("", "", clip.title, _turns(asked, rng)))
    return rows


def text_rows(clips: list[ChatClip], seed: int) -> list[dict[str, object]]:
    """A row of text of each clip, from which a decoder learns what questions ask for before it sees anything."""
    rng = np.random.default_rng((seed, 6))
    asked = [[*questions_of(clip), scene_of(clip)] for clip in clips]
    return [conversation_row("", "", clip.title, _turns(one, rng)) for clip, one in zip(clips, asked, strict=True)]


def _turns(asked: list[Question], rng: np.random.Generator) -> list[tuple[str, Question]]:
    """Some of the questions in random order, each in one of its phrasings."""
    count = min(len(asked), int(rng.integers(1, MOST_TURNS + 1)))
    chosen = [asked[i] for i in rng.permutation(len(asked))[:count]]
    return [(question.phrasings[rng.integers(len(question.phrasings))], question) for question in chosen]


def test_rows(clips: list[ChatClip]) -> list[dict[str, object]]:
    """Rows of one question each: every question about every clip, with its phrasings in turn."""
    rows: list[dict[str, object]] = []
    for clip in clips:
        for question in questions_of(clip):
            phrasing = question.phrasings[len(rows) % len(question.phrasings)]
            rows.append(conversation_row("video", clip.file, "<|video|>", [(phrasing, question)]))
    return rows


def scene_rows(clips: list[ChatClip]) -> list[dict[str, object]]:
    """Rows that ask for everything that a clip shows, one of each clip."""
    phrasings = [SCENE[i % len(SCENE)] for i in range(len(clips))]
    return [
        conversation_row("video", clip.file, "<|video|>", [(phrasing, scene_of(clip))])
        for clip, phrasing in zip(clips, phrasings, strict=True)
    ]


def texts_of(clips: list[ChatClip]) -> list[str]:
    """Texts for a tokenizer and a language model: all titles, and the lines of all questions and answers."""
    asked = [question for clip in clips for question in (*questions_of(clip), scene_of(clip))]
    lines = {f"Human: {phrasing}" for question in asked for phrasing in question.phrasings}
    answers = {f"AI: {question.answer}" for question in asked}
    return [*sorted({clip.title for clip in clips}), *sorted(lines), *sorted(answers), INTRODUCTION]


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Write an instruct file, one row a line."""
    path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows), encoding="utf-8")
