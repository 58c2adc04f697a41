"""Contact sheet: one image with the frames that the model saw of each clip, below lines of text."""

import io
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import frames as frames_lib
from ymplug_jax.reports import fonts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
MOST = 64  # clips per sheet
HIGHEST = 60_000  # height in pixels; Matplotlib cannot write 65,536 or more
NARROWEST = 620  # width in pixels, so that text fits beside a single frame
LINES = 12  # lines of text per clip
COLUMNS = 8  # frames per row
DPI = 110
FRAME = (220, 150)  # width and height of a frame's cell in pixels
MARGIN, LINE, STAMP = 12, 21, 17  # pixels: outer margin, height of a text line, height of a time stamp
POINTS = 10  # font size of the text


def check(path: Path) -> None:
    """Check that `draw` can write the file, before any video is decoded.

    Raises:
      Mistake: The suffix is not supported, the path is a folder, or its folder does not exist or is not writable.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        named = path.suffix or "no suffix"
        raise Mistake(f"--sheet {path}: cannot draw {named}; name a file that ends in {', '.join(SUFFIXES)}")
    if path.is_dir():
        raise Mistake(f"--sheet {path}: a folder, not a file; give a file in it")
    if not path.parent.is_dir():
        raise Mistake(f"--sheet {path}: no such folder {path.parent}; create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Mistake(f"--sheet {path}: no permission to write there; check its permissions, or choose another file")


def draw(path: Path, records: Sequence[Any], texts: Sequence[str | Sequence[str]], frames: int) -> int:
    """Draw `frames` frames of every record, chosen as in evaluation, below its lines of text.

    Long lines are wrapped, the text of a clip is truncated to LINES lines, and at most MOST clips are drawn.

    Args:
      path: Path of the image, see `check`.
      records: Records to draw.
      texts: Lines of text of each record, the most important first, as a sequence or as one string; may be Chinese.
      frames: Frames per clip, T of the model.

    Returns:
      The number of clips drawn.

    Raises:
      Mistake: The file cannot be written.
      ValueError: The number of texts differs from the number of records, or there are no records.
    """
    if len(records) != len(texts) or not len(records):
        raise ValueError(f"{len(texts)} texts for {len(records)} records; give one text per record")
    across = min(frames, COLUMNS)
    width = max(2 * MARGIN + across * FRAME[0], NARROWEST)
    pictures, words, top = [], [], 0  # (x, y, image), (x, y, text, size, colour)
    count = 0
    for record, text in zip(records[:MOST], texts, strict=False):
        lines = wrap(text.split("\n") if isinstance(text, str) else text, width - 2 * MARGIN)
        # A conversation without media is its text alone.
        chosen = frames_lib.choose_frames(frames, len(record.frames), None) if len(record.frames) else ()
        rows = [chosen[i : i + across] for i in range(0, len(chosen), across)]
        images = [[_fit(record.frames[stored]) for stored in row] for row in rows]
        tall = [max(image.shape[0] for image in row) + 2 for row in images]
        height = MARGIN + LINE * max(1, len(lines)) + sum(tall) + STAMP * len(rows)
        if top + height > HIGHEST and count:
            break
        y = top + MARGIN
        for number, line in enumerate(lines):
            words.append((MARGIN, y + number * LINE, line, POINTS, "black" if number == 0 else "0.25"))
        y += LINE * max(1, len(lines))
        for row, stored, high in zip(images, rows, tall, strict=True):
            for place, (image, frame) in enumerate(zip(row, stored, strict=True)):
                pictures.append((MARGIN + place * FRAME[0], y, image))
                seconds = f"{record.timestamps[frame] / 1e6:.1f} s"
                words.append((MARGIN + place * FRAME[0], y + high, seconds, 8, "0.4"))
            y += high + STAMP
        top, count = top + height, count + 1
    _replace(Path(path), _compose(width, top + MARGIN, pictures, words, Path(path).suffix.lower().removeprefix(".")))
    return count


def _compose(width: int, height: int, pictures: list[tuple], words: list[tuple], form: str) -> bytes:
    """Encode an image of frames and texts; positions are in pixels from the top left."""
    from matplotlib.figure import Figure

    canvas = np.full((height, width, 3), 255, np.uint8)
    for x, y, image in pictures:
        canvas[y : y + image.shape[0], x : x + image.shape[1]] = image
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(canvas)
    families = list(fonts.families())
    for x, y, text, size, colour in words:
        figure.text(
            x / width, 1 - y / height, text, fontsize=size, color=colour, va="top", fontfamily=families,
            parse_math=False,  # a title may contain dollar signs
        )  # fmt: skip
    buffer = io.BytesIO()
    # PNG compression takes most of the time.
    packing: dict[str, Any] = {"pil_kwargs": {"compress_level": 2}} if form == "png" else {}
    figure.savefig(buffer, format=form, dpi=DPI, **packing)
    return buffer.getvalue()


def wrap(lines: Sequence[str], width: int) -> list[str]:
    """Wrap lines to `width` pixels, at spaces if possible and between any Chinese characters; at most LINES lines, the last one "…"."""
    room = width / (POINTS / 72 * DPI / 2)  # in half ems; a Chinese character takes two
    made: list[str] = []
    for text in lines:
        text = "".join(c if c.isprintable() else " " for c in str(text).expandtabs(4)).rstrip()
        while text or not made:
            end = _fits(text, room)
            space = text.rfind(" ", end // 2, end) if end < len(text) else -1
            cut = space if space > 0 else end
            made.append(text[:cut])
            text = text[cut:].lstrip()
    return made if len(made) <= LINES else [*made[: LINES - 1], "…"]


def _fits(text: str, room: float) -> int:
    """Number of leading characters that fit, at least one."""
    size = 0.0
    for place, character in enumerate(text):
        size += 2 if unicodedata.east_asian_width(character) in "WF" else 1.15
        if size > room:
            return max(1, place)
    return len(text)


def _fit(jpeg: bytes) -> np.ndarray:
    """Decode a JPEG and scale it to a frame's cell: uint8[h, w, 3]; a grey image if it cannot be decoded."""
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB) if jpeg else None
    if image is None:
        return np.full((FRAME[1] - 6, FRAME[0] - 6, 3), 220, np.uint8)
    scale = min((FRAME[0] - 6) / image.shape[1], (FRAME[1] - 6) / image.shape[0])
    size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)


def _replace(path: Path, data: bytes) -> None:
    """Write the file atomically."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Mistake(f"--sheet {path}: cannot be written ({error.strerror or error}); choose another file") from None
