"""Stage 1 of the chat model: next-token loss on the titles of clips, through the frozen decoder.

Several clips with their titles are packed into one row. See docs/models/mplug_chat.md, "Recipe".
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.data.conversation import Tokens
from ymplug_jax.data.packing import Size
from ymplug_jax.data.records import Medium, Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.tasks.common import preprocess
from ymplug_jax.tasks.mplug_chat import packed_rows, passes
from ymplug_jax.tasks.mplug_chat.packed_rows import Piece
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.task import TITLED, Example, Task

SCORES = passes.SCORES


@dataclasses.dataclass(frozen=True)
class Options:
    """How titles are packed."""

    # Clips that a row of `config.data.max_tokens` tokens holds at most. Every row takes the memory and time of all of them. 1: rows are
    # not packed, so the titles need not be measured before the first step.
    videos_per_row: int = option(24, least=1)


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUGChat."""
    data, options = experiment.data, build(Options, experiment.options)
    model, tokenizer, shape = passes.model_of(experiment, images=0, videos=options.videos_per_row)

    def tokens_of(record: Record) -> Tokens:
        known = preprocess.given(tokenizer)
        title = known.encode(clean_text(record.title, data.max_words))
        return packed_rows.titled(title, known.bos, known.eos, shape.slots, shape.length)

    def measure(record: Record) -> Size:
        return packed_rows.size_of(tokens_of(record), shape.slots)

    def example(given: Sequence[Record] | Record, rng: np.random.Generator | None) -> Example:
        records = [given] if isinstance(given, Record) else given
        pieces = [
            Piece(record.media_id, tokens_of(record), [Medium(False, record.media_id, record.frames)])
            for record in records
        ]
        return packed_rows.packed(pieces, shape, preprocess.given(tokenizer).pad)

    packing = {"measure": measure, "room": shape.room} if options.videos_per_row > 1 else {}
    return passes.task_of(model, experiment, shape, kinds=TITLED, example=example, **packing)
