"""Conversations as records without shards; shared by the tests of the chat model's evaluation."""

from collections.abc import Sequence

import numpy as np

import shards
from ymplug_jax.data.records import Medium, Record

FRAMES = 2


def clip(number: int, frames: int = FRAMES, still: bool = False, name: str = "") -> Medium:
    """A medium of noise that depends on the number."""
    own = [shards.jpeg(1000 * number + t, 16) for t in range(frames)]
    return Medium(still, name or f"videos/{number}.mp4", own)


def record(
    media: Sequence[Medium], question: str, answer: str, task_type: str = "colour_sft", options: Sequence[str] = ()
) -> Record:
    """A conversation of one question about the media."""
    holders = ["<image>" if medium.still else "<|video|>" for medium in media]
    text = "\n".join(["系统", *(f"Human: {one}" for one in holders), f"Human: {question}", f"AI: {answer}"])
    return record_of(media, text, task_type, options)


def record_of(media: Sequence[Medium], text: str, task_type: str = "colour_sft", options: Sequence[str] = ()) -> Record:
    """A record of a whole conversation."""
    frames = [frame for medium in media for frame in medium.frames]
    times = np.concatenate([np.arange(len(medium.frames)) for medium in media] or [np.zeros(0)]).astype(np.int64)
    first = media[0].name if media else "rows.jsonl:1"
    return Record(first, frames, times, "", [], "", -1, text, tuple(media), task_type, tuple(options))


class Held(list):
    """Records of a split that are held in memory."""

    path, split, kind = "held", "validation", "instruct"
