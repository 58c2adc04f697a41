"""The page of an annotator: one HTML file with the frames of every clip, which needs no network and exports the answers as CSV."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np

from data_prep.annotation.answers import columns
from data_prep.annotation.items import KINDS, NO, YES, Item, Key
from data_prep.flags import bar
from data_prep.video_frames import Reader, Reject
from ymplug_jax.data.video_path import resolve

HEIGHT, QUALITY = 160, 70  # of a frame on the page, in pixels and of JPEG
STORED = 16  # frames that are read of a clip, of which the page shows some
TIME_LIMIT = 120.0  # seconds a clip may take


def read_frames(files: Sequence[str], root: Path, count: int) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Read the frames of clips.

    Args:
      files: names below the root.
      root: folder of the videos.
      count: frames of each, evenly spaced; a shorter clip has fewer.

    Returns:
      (file -> data URIs of small JPEGs, file that cannot be read -> why).

    Raises:
      DecoderFailed: the decoder cannot start.
    """
    frames: dict[str, list[str]] = {}
    bad: dict[str, str] = {}
    reader = Reader(TIME_LIMIT)
    try:
        for file in bar(list(dict.fromkeys(files)), "reading", "clip"):
            try:
                clip = reader.read(resolve(str(root), file), max(count, STORED))
            except Reject as reject:
                bad[file] = ": ".join(map(str, reject.args))
                continue
            chosen = sorted({(2 * i + 1) * clip.decoded // (2 * count) for i in range(count)})
            frames[file] = [thumbnail(clip.frames[i]) for i in chosen]
    finally:
        reader.close()
    return frames, bad


def thumbnail(jpeg: bytes) -> str:
    """Return the data URI of a small copy of a JPEG."""
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    height, width = image.shape[:2]
    size = (max(1, min(round(width * HEIGHT / height), 4 * HEIGHT)), HEIGHT)
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1].tobytes()
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def render(
    key: Key,
    annotator: str,
    items: Sequence[Item],
    frames: Mapping[str, Sequence[str]],
    notes: Sequence[str] | None = None,
) -> str:
    """The page of one annotator.

    Args:
      key: of the sheets. The page does not show which items are gold.
      annotator: whose page it is.
      items: in order.
      frames: data URIs of each file.
      notes: for the adjudicator: what is said about each item.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    cards: list[dict[str, Any]] = [
        {"item": item, "frames": frames.get(item.file, ()), "note": notes[i] if notes else ""}
        for i, item in enumerate(items)
    ]
    choices = {"classification": list(key.classes), "pairs": [YES, NO], "captions": []}[key.kind]
    return made.get_template("annotation_sheet.html").render(
        annotator=annotator, kind=key.kind, question=KINDS[key.kind].question, cards=cards, choices=choices,
        columns=columns(key.kind), shown=KINDS[key.kind].shown,
    )  # fmt: skip
