"""Fonts with Chinese characters for what is drawn by Matplotlib, whose own font has none."""

import contextlib
import logging
import warnings
from functools import cache
from typing import Any

# By the names that they have on common systems, best first.
FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC", "Arial Unicode MS", "Droid Sans Fallback",
)  # fmt: skip
LATIN = "DejaVu Sans"  # comes with Matplotlib
SAMPLE = "视频标题"  # what a font must be able to draw


@cache
def families() -> tuple[str, ...]:
    """Font families for text that may be Chinese, in the order in which they are tried for each character.

    The first is a font with Chinese characters if any is installed, also one that was installed after Matplotlib listed the
    system's fonts. If there is none, one line says so, and only Matplotlib's own font is returned.
    """
    # Debug output of the drawing library is not ours, nor are its warnings about each missing character.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import font_manager

    found = _chinese(font_manager)
    if not found:
        logging.error(
            "no font with Chinese characters is installed; pictures show boxes instead of them (Debian and Ubuntu: "
            "apt-get install fonts-noto-cjk)"
        )
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return (LATIN,)
    return (found, LATIN)


def _chinese(font_manager: Any) -> str | None:
    manager = font_manager.fontManager
    known = {font.name for font in manager.ttflist}
    for name in FONTS:
        if name in known:
            return name
    listed = {font.fname for font in manager.ttflist}
    for file in set(font_manager.findSystemFonts()) - listed:
        with contextlib.suppress(RuntimeError, OSError):  # a broken font file is not our concern
            manager.addfont(file)
    known = {font.name for font in manager.ttflist}
    named = (name for name in FONTS if name in known)
    return next(named, None) or next((font.name for font in manager.ttflist if _draws(font_manager, font.fname)), None)


def _draws(font_manager: Any, file: str) -> bool:
    """Whether the font has the characters of SAMPLE: fonts of other names will do as well."""
    with contextlib.suppress(RuntimeError, OSError):
        font = font_manager.get_font(file)
        return all(font.get_char_index(ord(character)) for character in SAMPLE)
    return False
