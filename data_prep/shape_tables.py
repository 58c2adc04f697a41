"""Texts and CSVs of the corpus of moving shapes."""

import csv
import itertools
import math
from pathlib import Path

from data_prep.shape_clips import COLOURS, LABELS, MOTIONS, SHAPES, Clip
from ymplug_jax.data.schema import CLASS_NAMES, COLUMNS


def all_texts() -> list[str]:
    """Return the texts that a language model is pre-trained on before it sees a video.

    They contain every title with every class, and both answers to every match question, so that the answer is in the video only.
    """
    clips = [Clip("", *words, seed=()) for words in itertools.product(COLOURS, SHAPES, MOTIONS)]
    titles = [clip.title for clip in clips]
    classes = [f"视频标题：{clip.plain_title} 视频类目：{LABELS[clip.motion]}" for clip in clips]
    matches = [f"标题：{title} 这个视频与标题匹配吗？{answer}" for title in titles for answer in "是否"]
    return titles * 3 + classes + matches + list(CLASS_NAMES)  # titles are repeated, since video pre-training uses them


def write_tables(clips: list[Clip], split: str, root: Path, gallery: list[Clip] | None = None) -> None:
    """Write the four CSVs of Youku-mPLUG and the CSV of questions for one split.

    As in Youku-mPLUG, the benchmarks have fewer training clips than pre-training, here a third. Captioning has one caption per row
    in training and a list of three in validation. Classification titles do not mention the motion, since it determines the class.
    """
    for kind in COLUMNS:
        share = len(clips) if kind == "pretrain" or split == "val" else math.ceil(len(clips) / 3)
        shown = gallery if gallery and kind == "retrieval" else clips[:share]
        write_table(root / f"{kind}_{split}.csv", kind, split, shown)


def write_table(path: Path, kind: str, split: str, clips: list[Clip]) -> None:
    """Write a CSV of `clips` with the columns of its kind."""
    file_column, text_columns = COLUMNS[kind]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow((file_column, *text_columns))
        writer.writerows((clip.file, *texts_of(clip, kind, split)) for clip in clips)


def texts_of(clip: Clip, kind: str, split: str) -> tuple[str, ...]:
    """Return the text columns of a clip for one kind of CSV."""
    if kind == "classification":
        return clip.plain_title, LABELS[clip.motion]
    if kind == "question":
        return f"{clip.plain_title}在做什么", clip.motion
    if kind == "captioning" and split == "val":
        return (str(clip.references),)
    return (clip.title,)


def write_titles(path: Path, rows: list[tuple[str, str]]) -> None:
    """Write a pre-training CSV of (file, title)."""
    file_column, text_columns = COLUMNS["pretrain"]
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow((file_column, *text_columns))
        writer.writerows(rows)
