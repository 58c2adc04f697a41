"""Scores of short open answers: exact match, containment, and the best answer that ignores the question's media."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

ENDS = " 。．.!！?？,，;；、"  # dropped at the end of a text


def normal(text: str) -> str:
    """The form in which answers are compared.

    Unicode NFKC, lower case, one space for each run of white space, no punctuation of sentences at the end. A text of nothing
    else stays as it is, so that only the empty text becomes empty.
    """
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.rstrip(ENDS) or plain


def exact(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer equals one of the references in normal form. An empty answer is never right."""
    said = normal(answer)
    return bool(said) and any(said == normal(reference) for reference in references)


def contains(answer: str, references: Iterable[str]) -> bool:
    """Whether the answer contains one of the references in normal form.

    Latin letters and digits count as whole words: "12" does not contain "1". Chinese has no such borders: "红色的" contains "红".
    """
    said = normal(answer)
    return any(_inside(normal(reference), said) for reference in references)


def _inside(wanted: str, said: str) -> bool:
    if not wanted:
        return False
    before = r"(?<![a-z0-9])" if re.match(r"[a-z0-9]", wanted) else ""
    after = r"(?![a-z0-9])" if re.search(r"[a-z0-9]$", wanted) else ""
    return re.search(before + re.escape(wanted) + after, said) is not None


def distinct(texts: Iterable[str]) -> list[str]:
    """The texts that differ in normal form, each as it is first written, in order."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(normal(text), text)
    return list(found.values())


def majority(references: Sequence[Sequence[str]]) -> tuple[str, float]:
    """The answer that is right for most questions, and its share.

    Args:
      references: Of N questions, the right answers of each; repeated answers of one question count once.

    Returns:
      The answer as it is first written, and the share of the questions. The first such answer wins a tie. ("", 0.0) without
      questions.
    """
    counts: Counter[str] = Counter()
    written: dict[str, str] = {}
    for one in references:
        for text in one:
            written.setdefault(normal(text), text)
        counts.update(dict.fromkeys(map(normal, one), 1))
    if not counts:
        return "", 0.0
    best = max(counts, key=lambda text: counts[text])  # max keeps the first of equals
    return written[best], counts[best] / len(references)


def mean(values: Iterable[Any]) -> float | None:
    """Mean of the values that are there; None without any."""
    known = [float(value) for value in values if value is not None]
    return sum(known) / len(known) if known else None
