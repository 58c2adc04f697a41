"""Answers as lines of text: JSON for programs, short paragraphs for people."""

import json
import unicodedata
from typing import Any


def as_json(answer: dict[str, Any], encoding: str | None) -> str:
    """One line of JSON. Where `encoding` lacks a character, all beyond ASCII are escaped as JSON does (\\ud83d\\ude00), which is valid
    JSON in every terminal; Python's own escapes are not."""
    text = json.dumps(answer, ensure_ascii=False)
    try:
        text.encode(encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(answer)
    return text


def shown(text: str) -> str:
    """Text for one line of a terminal: control characters, line separators and bytes of no encoding are escaped."""
    odd = ("Cc", "Cs", "Zl", "Zp")
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in odd else c for c in text)


def readable(answer: dict[str, Any]) -> str:
    """An answer for a person."""
    if "caption" in answer:
        return f"{shown(answer['video'])}: {shown(answer['caption'])}"
    if "ranking" in answer:
        lines = [
            f"{number}. {shown(name)}  ({score:+.3f})" for number, (name, score) in enumerate(answer["ranking"], 1)
        ]
        return "\n".join(
            [shown(answer["text"] if "text" in answer else answer["video"]), *("   " + line for line in lines)]
        )
    shares = ", ".join(f"{shown(name)} {100 * share:.1f} %" for name, share in answer["best"].items())
    first = f"{shown(answer['video'])}: {shown(answer['class'])}"
    return f"{first}\n   by {answer['shown']}: {shares}; the head says {shown(answer['head'])}"
