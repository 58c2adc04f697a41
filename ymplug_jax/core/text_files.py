"""Text files as users have them: UTF-8 with or without a byte order mark, lines that end at a line feed only.

`str.splitlines` and text mode end lines at more characters: U+2028, for one, is a token of bert-base-chinese and occurs in titles,
and a lone carriage return is no end of a line either.
"""

import re
from pathlib import Path

from etils import epath

from ymplug_jax.core import exits


def read_lines(file: Path | epath.Path) -> list[str]:
    """The lines of a file without their ends: "\\n", or "\\r\\n". Empty lines stay; the end of the last line may be missing.

    Raises:
      FileNotFoundError: no such file.
      exits.Mistake: see `read_text`.
    """
    lines = read_text(file).split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_text(file: Path | epath.Path) -> str:
    """The text of a file without its byte order mark; line ends stay as they are.

    Raises:
      FileNotFoundError: no such file.
      exits.Mistake: not UTF-8, a folder, or a Git LFS pointer; the message names the file.
    """
    try:
        data = file.read_bytes()
    except IsADirectoryError:
        raise exits.Mistake(f"{file}: a folder; give a file") from None
    if found := lfs_pointer(data):
        raise exits.Mistake(f"{file}: {found}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        kind = "UTF-16, not UTF-8" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else f"not UTF-8 (byte {error.start})"
        raise exits.Mistake(f"{file}: {kind}; save it as UTF-8") from None


def lfs_pointer(head: bytes) -> str:
    """What to say of a file that begins with these bytes if it only stands for the one in Git LFS, "" otherwise."""
    if not head.startswith(b"version https://git-lfs.github.com/"):
        return ""
    size = re.search(rb"^size (\d+)\r?$", head[:1024], re.MULTILINE)
    whole = f" ({int(size[1]):,} bytes)" if size else ""
    return f"a Git LFS pointer, not the file itself{whole}; run `git lfs install && git lfs pull` in its repository"


def web_page(head: bytes) -> str:
    """What to say of a file that begins with these bytes if a web server's page was saved in its place, "" otherwise."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:9].lower()
    if not start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")):
        return ""
    return (
        "a web page (HTML or XML), not the file itself; download the file again, after a login if the page asks for one"
    )
