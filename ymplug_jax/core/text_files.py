"""Reading of text files: UTF-8 with or without a byte order mark, lines separated by line feeds only.

`str.splitlines` and text mode also split at other characters, such as U+2028, which is a token of bert-base-chinese and occurs in
titles, and at a lone carriage return.
"""

import re
from pathlib import Path

from etils import epath

from ymplug_jax.core import exits


def read_lines(file: Path | epath.Path) -> list[str]:
    """Return the lines of a file without "\\n" or "\\r\\n". Empty lines are kept; the last line may lack its end.

    Raises:
      FileNotFoundError: the file does not exist.
      exits.Mistake: see `read_text`.
    """
    lines = read_text(file).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_text(file: Path | epath.Path) -> str:
    """Return the text of a file without its byte order mark. Line ends are kept.

    Raises:
      FileNotFoundError: the file does not exist.
      exits.Mistake: a folder, a Git LFS pointer, or not UTF-8; the message names the file.
    """
    try:
        data = file.read_bytes()
    except IsADirectoryError:
        raise exits.Mistake(f"{file}: a folder, not a file; give a file in it") from None
    if found := lfs_pointer(data):
        raise exits.Mistake(f"{file}: {found}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16, not UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 (byte {error.start})"
        raise exits.Mistake(f"{file}: {kind}; save it as UTF-8") from None


def lfs_pointer(head: bytes) -> str:
    """Return an error message if a file beginning with these bytes is a Git LFS pointer, else ""."""
    if not head.startswith(b"version https://git-lfs.github.com/"):
        return ""
    size = re.search(rb"^size (\d+)\r?$", head[:1024], re.MULTILINE)
    whole = f" ({int(size[1]):,} bytes)" if size else ""
    return f"a Git LFS pointer, not the file itself{whole}; run `git lfs install && git lfs pull` in its repository"


def web_page(head: bytes) -> str:
    """Return an error message if a file beginning with these bytes is a web page saved in its place, else ""."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:9].lower()
    if not start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return ""
    return "a web page (HTML or XML), not the file itself; download the file again, after logging in if the page requires it"
