"""The introduction of a data set of conversations: the text before the first turn, which questions to the tuned model need as well."""

import contextlib
import logging
from collections import Counter

import numpy as np

from ymplug_jax.data import conversation
from ymplug_jax.data.records import CorruptRecord, Split

SAMPLE = 500  # records


def of_split(records: Split) -> str:
    """The most frequent introduction among evenly spread records, the first in alphabetical order among equals.

    Args:
      records: conversations, of one folder or several. Those without an answer and corrupt ones, of which the reader of the training
        tells, are left out.

    Returns:
      The introduction; "" if most conversations have none. `conversation.SYSTEM` if there is no conversation with an answer.
    """
    found = Counter[str]()
    for i in _places(len(records)):
        with contextlib.suppress(CorruptRecord):
            text = conversation.introduction_of(records[i].text)
            if text is not None:
                found[text] += 1
    if not found:
        return conversation.SYSTEM
    chosen = min(found, key=lambda text: (-found[text], text))
    others = f"; {len(found) - 1} others" if len(found) > 1 else ""
    logging.info(
        "introduction of the conversations: %r, in %d of %d records%s", chosen, found[chosen], found.total(), others
    )
    return chosen


def _places(length: int) -> list[int]:
    """A place in each of at most `SAMPLE` equal parts of the records, drawn, so that rows in a regular order show all their kinds."""
    ends = np.arange(min(SAMPLE, length) + 1) * length // max(min(SAMPLE, length), 1)
    return [int(i) for i in np.random.default_rng(0).integers(ends[:-1], ends[1:])]
