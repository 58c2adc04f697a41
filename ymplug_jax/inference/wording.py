"""Answers as lines of text: JSON for programs, short paragraphs for people."""

import json
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `predict` imports this module before it checks its flags: keep it light
    from ymplug_jax.tasks.presentation import Answer


def as_json(answer: "Answer", encoding: str | None) -> str:
    """One line of JSON. If `encoding` cannot express it, all characters beyond ASCII are written as JSON escapes (\\ud83d\\ude00)."""
    text = json.dumps(answer.json, ensure_ascii=False)
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(answer.json)
    return text


def shown(text: str) -> str:
    """The text with control characters, line separators and undecodable bytes escaped, for one line of a terminal."""
    odd = ("Cc", "Cs", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in odd else c for c in text)


def readable(answer: "Answer") -> str:
    """The answer as text for a terminal."""
    return "\n".join(map(shown, answer.lines))
