"""Stage 2 of the chat model: tuning on conversations with images, clips or text only; the loss counts answers only.

Several conversations are packed into one row, and each sees its own tokens only. See docs/models/mplug_chat.md, "Recipe".
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.data import conversation
from ymplug_jax.data.conversation import Tokens
from ymplug_jax.data.packing import Size
from ymplug_jax.data.records import Record
from ymplug_jax.tasks.common import preprocess
from ymplug_jax.tasks.mplug_chat import packed_rows, passes
from ymplug_jax.tasks.mplug_chat.packed_rows import Piece
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.task import Example, Task

ANSWERS = ("chat",)
SCORES = passes.SCORES


@dataclasses.dataclass(frozen=True)
class Options:
    """How conversations are packed."""

    # Images that a row of `config.data.max_tokens` tokens holds at most. 0: the data has none, and the pass over images is left out.
    images_per_row: int = option(4, least=0)
    # Clips that a row holds at most. 0: the data has none, and the pass over clips is left out.
    videos_per_row: int = option(8, least=0)


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUGChat."""
    options = build(Options, experiment.options)
    model, tokenizer, shape = passes.model_of(experiment, images=options.images_per_row, videos=options.videos_per_row)

    def tokens_of(record: Record) -> Tokens:
        return conversation.for_training(record.text, preprocess.given(tokenizer), shape.slots, shape.length)

    def measure(record: Record) -> Size:
        return packed_rows.size_of(tokens_of(record), shape.slots)

    def example(records: Sequence[Record], rng: np.random.Generator | None) -> Example:
        pieces = [Piece(record.media_id, tokens_of(record), record.media) for record in records]
        return packed_rows.packed(pieces, shape, preprocess.given(tokenizer).pad)

    return passes.task_of(
        model, experiment, shape, kinds=("instruct",), example=example, measure=measure, room=shape.room, chats=True
    )
