"""Contact sheet: the frames that a model saw of each clip, with its answer below, as one PNG."""

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ymplug_jax.data import frames as frames_lib

COLUMNS = 8  # frames beside each other at most
# Fonts with Chinese characters, by the names they have on common systems.
FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC", "Arial Unicode MS", "Droid Sans Fallback",
)  # fmt: skip


def draw(path: Path, records: list[Any], texts: list[str], frames: int) -> None:
    """Draw `frames` frames of every record, chosen as in evaluation, under its text.

    Args:
      path: of the PNG.
      records: data.records.Record each.
      texts: one a record.
      frames: T of the model.
    """
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    chinese = _chinese_fonts(font_manager)
    if not chinese:
        logging.error(
            "no font with Chinese characters is installed (e.g. fonts-noto-cjk); the sheet shows boxes instead"
        )
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
    columns = min(frames, COLUMNS)
    lines = -(-frames // columns)
    heights = [1.5 * lines + 0.28 * (2 + text.count("\n")) for text in texts]
    figure = Figure(figsize=(2.1 * columns, sum(heights)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(records), 1, height_ratios=heights))
    for part, record, text in zip(parts, records, texts, strict=True):
        chosen = frames_lib.choose_frames(frames, len(record.frames), None)
        part.suptitle(text, x=0.01, ha="left", fontsize=10, fontfamily=[*chinese, "DejaVu Sans"])
        axes = np.atleast_1d(part.subplots(lines, columns)).reshape(-1)
        for place, axis in enumerate(axes):
            axis.axis("off")
            if place < frames:
                image = cv2.imdecode(np.frombuffer(record.frames[chosen[place]], np.uint8), cv2.IMREAD_COLOR_RGB)
                axis.imshow(image)
                axis.set_title(f"{record.timestamps[chosen[place]] / 1e6:.1f} s", fontsize=8, color="0.4")
    figure.savefig(path, dpi=110)


def _chinese_fonts(font_manager: Any) -> list[str]:
    """Names of the installed fonts that will do, also of those installed since the drawing library listed them."""
    manager = font_manager.fontManager
    if not {font.name for font in manager.ttflist} & set(FONTS):
        listed = {font.fname for font in manager.ttflist}
        for file in set(font_manager.findSystemFonts()) - listed:
            with contextlib.suppress(RuntimeError, OSError):  # a broken font file is not our concern
                manager.addfont(file)
    known = {font.name for font in manager.ttflist}
    return [name for name in FONTS if name in known]
