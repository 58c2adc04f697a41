"""Stage 2 of the chat model: tuning on conversations with images, clips or text only; the loss counts answers only.

Several conversations are packed into one row, and each sees its own tokens only. See docs/models/mplug_chat.md, "Recipe".
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.state import Params
from ymplug_jax.data import conversation
from ymplug_jax.data.conversation import Tokens
from ymplug_jax.data.packing import Size
from ymplug_jax.data.records import Record
from ymplug_jax.models.mplug_chat import MPLUGChat
from ymplug_jax.tasks.common import preprocess
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.mplug_chat import answer_page, answer_scores, answering, introduction, packed_rows, passes
from ymplug_jax.tasks.mplug_chat.packed_rows import Piece
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.task import Batch, Example, Task

ANSWERS = ("chat",)
SCORES = (*answer_scores.known(), *passes.SCORES)


@dataclasses.dataclass(frozen=True)
class Options:
    """How conversations are packed, and how they are answered in evaluation."""

    # Images that a row of `config.data.max_tokens` tokens holds at most. 0: the data has none, and the pass over images is left out.
    images_per_row: int = option(4, least=0)
    # Clips that a row holds at most. 0: the data has none, and the pass over clips is left out.
    videos_per_row: int = option(8, least=0)
    new_tokens: int = option(64, least=1)  # Largest number of tokens of an answer in evaluation.
    # Most options of a question, which are scored by likelihood. Questions without options choose among the answers of their kind if
    # there are no more than this. 0: open answers only.
    choices: int = option(8, least=0)
    choice_tokens: int = option(32, least=2)  # Most tokens of an option, with its end token.


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUGChat."""
    options = build(Options, experiment.options)
    model, tokenizer, shape = passes.model_of(experiment, images=options.images_per_row, videos=options.videos_per_row)
    answering.check_room(model.llm, shape.length, options.new_tokens, options.choice_tokens if options.choices else 0)

    def tokens_of(record: Record) -> Tokens:
        return conversation.for_training(record.text, preprocess.given(tokenizer), shape.slots, shape.length)

    def measure(record: Record) -> Size:
        return packed_rows.size_of(tokens_of(record), shape.slots)

    def example(records: Sequence[Record], rng: np.random.Generator | None) -> Example:
        pieces = [Piece(record.media_id, tokens_of(record), record.media) for record in records]
        made = packed_rows.packed(pieces, shape, preprocess.given(tokenizer).pad)
        return made if rng is not None else made | asked(records[0])

    def asked(record: Record) -> Example:
        known = preprocess.given(tokenizer)

        def place(ids: np.ndarray) -> np.ndarray:
            return packed_rows.index_of(ids, shape)

        made = answering.prompt_of(record, known, shape.slots, shape.length, place)
        if options.choices:
            made |= answering.options_of(record, known, options.choices, options.choice_tokens)
        return made

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        def read(run: MPLUGChat) -> jax.Array:
            return run.embed_rows(batch["prompt_ids"], passes.slots_of(run, batch), batch["prompt_index"])

        embeds = within(model, params, read)  # [B, L, H]
        eos = passes.end_of(model, tokenizer)
        return answering.answers(model.llm, params["llm"], embeds, batch, options.new_tokens, eos)

    return passes.task_of(
        model,
        experiment,
        shape,
        kinds=("instruct",),
        example=example,
        measure=measure,
        room=shape.room,
        chats=True,
        introduction=introduction.of_split,
        predict=predict,
        asked_spec=answering.spec(shape.length, options.choices, options.choice_tokens),
        views=lambda records: answering.views(
            records, preprocess.given(tokenizer), options.choices, options.choice_tokens
        ),
        score=lambda rows, records: answering.report(rows, records, preprocess.given(tokenizer)),
        scores=SCORES,
        page=answer_page.page(),
    )
