"""Checks of the files and texts that a user of the Python interface gives."""

import os
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypeAlias

from ymplug_jax.core.exits import Mistake

Name: TypeAlias = str | os.PathLike[str]


def _listed(values: Sequence[Any], name: str) -> list[Any]:
    """The values as a list.

    Raises:
      Mistake: not a sequence, but a single value, whose characters would be taken for names, or a set, which has no order.
    """
    if isinstance(values, str | bytes | os.PathLike):
        raise Mistake(f"{name}: {values!r} is a single value; give a list, such as [{values!r}]")
    if isinstance(values, Set | Mapping) or not isinstance(values, Iterable):
        raise Mistake(f"{name}: a {type(values).__name__}, whose order is not that of the answers; give a list")
    return list(values)


def names(paths: Sequence[Name]) -> list[str]:
    """Names of files.

    Raises:
      Mistake: as `_listed`, or an element is empty or no path.
    """
    listed = _listed(paths, "paths")
    for path in listed:
        if not path or not isinstance(path, str | bytes | os.PathLike):
            raise Mistake(f"paths: {path!r}: not the path of a file; give the paths of video files")
    return [os.fsdecode(path) for path in listed]


def one_or_more(paths: Name | Sequence[Name]) -> list[str]:
    """Names of files, from one name or several; errors as `names`."""
    return names([paths] if isinstance(paths, str | bytes | os.PathLike) else paths)


def words(texts: Sequence[str], name: str) -> list[str]:
    """Texts that a tokenizer takes.

    Raises:
      Mistake: as `_listed`, or an element is no text.
    """
    listed = _listed(texts, name)
    for text in listed:
        if not isinstance(text, str):
            raise Mistake(f"{name}: {text!r}: not a str; give texts")
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise Mistake(f"{name}: {text!r}: holds a character that is not Unicode; decode the text again")
    return listed
