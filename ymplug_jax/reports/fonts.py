"""Fonts with Chinese characters for Matplotlib, whose default font has none."""

import contextlib
import logging
import warnings
from functools import cache
from typing import Any

# Font names on common systems, in order of preference.
FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Heiti SC", "Arial Unicode MS", "Droid Sans Fallback",
)  # fmt: skip
LATIN = "DejaVu Sans"  # comes with Matplotlib
SAMPLE = "视频标题"  # what a font must be able to draw


@cache
def families() -> tuple[str, ...]:
    """Font families for text that may be Chinese, in fallback order.

    The first is an installed font with Chinese characters, even if it is newer than Matplotlib's font cache. Without such a
    font, one line is logged and only Matplotlib's default font is returned.
    """
    # Hide Matplotlib's debug output and its warning for each missing character.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import font_manager

    found = _chinese(font_manager)
    if not found:
        logging.error(
            "no font with Chinese characters is installed, so images show boxes instead; install one (Debian and Ubuntu: "
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
        with contextlib.suppress(RuntimeError, OSError):  # skip broken font files
            manager.addfont(file)
    known = {font.name for font in manager.ttflist}
    named = (name for name in FONTS if name in known)
    return next(named, None) or next((font.name for font in manager.ttflist if _draws(font_manager, font.fname)), None)


def _draws(font_manager: Any, file: str) -> bool:
    """Whether the font has the characters of SAMPLE, whatever its name."""
    with contextlib.suppress(RuntimeError, OSError):
        font = font_manager.get_font(file)
        return all(font.get_char_index(ord(character)) for character in SAMPLE)
    return False
