"""Answers as lines of text: JSON for programs, short paragraphs for people."""

import json
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # decoding processes import this module: it stays light
    from ymplug_jax.tasks.presentation import Answer


def as_json(answer: "Answer", encoding: str | None) -> str:
    """One line of JSON. Where `encoding` lacks a character, all beyond ASCII are escaped as JSON does (\\ud83d\\ude00), which is valid
    JSON in every terminal; Python's own escapes are not."""
    text = json.dumps(answer.json, ensure_ascii=False)
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(answer.json)
    return text


def shown(text: str) -> str:
    """Text for one line of a terminal: control characters, line separators and bytes of no encoding are escaped."""
    odd = ("Cc", "Cs", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in odd else c for c in text)


def readable(answer: "Answer") -> str:
    """An answer for a person."""
    return "\n".join(map(shown, answer.lines))
