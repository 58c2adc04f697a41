"""Video question answering with mPLUG-2: a decoder that reads the video and the question, generating or ranking a list of answers.

See docs/models/mplug2.md, "Question answering".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record, Split
from ymplug_jax.data.text import Tokenizer, clean_text
from ymplug_jax.models import decode_answers, mplug2
from ymplug_jax.models.language_model import Memory
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.tasks.common import losses, open_answers, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.mplug2 import answer_page, generation, inputs
from ymplug_jax.tasks.mplug2.answer_list import AnswerList
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.presentation import Answer
from ymplug_jax.tasks.task import Batch, Example, Report, Row, Task

ANSWERS = ("answer",)
SCORES = (*scores.shares("exact", "contains", "token_accuracy"), *scores.losses("loss"))


@dataclasses.dataclass(frozen=True)
class Options:
    """How questions are answered."""

    # File of possible answers, one per line, which are ranked; "" generates answers.
    answers: str = option("", file=True)
    # With `answers`: number of answers, those with the likeliest first tokens, that are ranked by all their tokens.
    best: int = option(128, least=1)
    answer_tokens: int = option(
        12, least=3
    )  # Length of an answer in training, start and end token included; longer ones are cut.
    beams: int = option(5, least=1)  # Number of beams of a generated answer.
    least_tokens: int = option(1, least=0)  # Tokens of a generated answer without its end token, at the least.
    new_tokens: int = option(10, least=1)  # Largest number of generated tokens, end token included.


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUG2, without heads.

    The title of a record is the question, its label the answer.
    """
    data, keep, options = experiment.data, experiment.train.keep_logits, build(Options, experiment.options)
    model = inputs.model_of(experiment)
    _check(model, options)
    tokenizer, length = inputs.tokenizer_of(data, model), data.max_tokens
    listed = None if tokenizer is None or not options.answers else AnswerList.read(options.answers, tokenizer)
    if listed is not None:
        listed.check_room(model.decoder)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        known = preprocess.given(tokenizer)
        words = known.encode(clean_text(record.title, data.max_words))
        return {
            "video": preprocess.video_of(record, data, rng),
            **inputs.encode(known, words, length, end=False),
            **inputs.encode(known, known.encode(record.label_text), options.answer_tokens, "answer"),
            "labelled": np.array(bool(record.label_text)),
        }

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        video, kept = preprocess.normalize(batch["video"], model.vision.dtype), batch["valid"] & batch["labelled"]
        told = batch["answer_mask"] * kept[:, None]
        total, tokens, right = answer_loss(model, params, video, batch, told, key, keep_logits=keep)
        mean = Mean(total, jnp.sum(kept, dtype=jnp.float32))
        return losses.ratio(mean), {"loss": mean, "token_accuracy": Mean(right, tokens)}

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        known, video = preprocess.given(tokenizer), preprocess.normalize(batch["video"], model.vision.dtype)
        memory = within(model, params, lambda run: read(run, video, batch["ids"], batch["mask"]))
        if listed is not None:
            best = min(options.best, len(listed.texts))
            found = decode_answers.rank(
                model.decoder, params["decoder"], memory, jnp.asarray(listed.ids), jnp.asarray(listed.mask), best
            )
            return {"ranked": found.answers, "probabilities": found.probabilities, "valid": batch["valid"]}
        made = generation.generate(
            model.decoder, params["decoder"], memory, [known.bos], known.eos, **_search(options)
        )  # fmt: skip
        return made | {"valid": batch["valid"]}

    def lengths(record: Record) -> tuple[int, int]:
        asked, read = inputs.lengths(tokenizer, data, [record.title], length - 1)
        told = len(preprocess.given(tokenizer).encode(record.label_text))
        return asked + told, read + min(told, options.answer_tokens - 2)

    def described(row: Mapping[str, np.ndarray], record: Record, best: int) -> Answer:
        return describe(row, record, best, preprocess.given(tokenizer), listed)

    def score(rows: list[Row], records: Split) -> Report:
        return report_of(rows, records, preprocess.given(tokenizer), listed, options.new_tokens)

    row, answer = preprocess.row_spec(length), preprocess.row_spec(options.answer_tokens)
    spec = {"video": preprocess.video_spec(data), "ids": row, "mask": row, "answer": answer, "answer_mask": answer}
    return inputs.task_of(
        model,
        kinds=("question",),
        example=example,
        spec=spec | {"labelled": jax.ShapeDtypeStruct((), jnp.bool_)},
        lengths=lengths,
        loss=loss,
        predict=predict,
        score=score,
        scores=SCORES,
        page=answer_page.page(model.decoder.vocab),
        describe={"answer": described},
    )


def _search(options: Options) -> dict[str, int]:
    """The arguments of the search."""
    return {name: getattr(options, name) for name in ("beams", "least_tokens", "new_tokens")}


def _check(model: MPLUG2, options: Options) -> None:
    """Check that the model has the parts of the task and no others.

    Raises:
      Mistake: It does not, or a setting of the search is out of range.
    """
    if not (model.reads and model.generates):
        raise Mistake("config.model: question answering needs reads and generates; set both to True")
    if model.contrastive_width or model.matching or model.masked or model.classes:
        raise Mistake(
            "config.model: question answering has no heads; set contrastive_width=0, matching=False, masked=False and classes=0"
        )
    if options.answer_tokens > model.decoder.max_positions:
        raise Mistake(
            f"config.options.answer_tokens: {options.answer_tokens} exceeds config.model.decoder.max_positions "
            f"{model.decoder.max_positions}; lower it"
        )
    generation.check(model.decoder, **_search(options))


def read(run: MPLUG2, video: jax.Array, ids: jax.Array, mask: jax.Array, *, deterministic: bool = True) -> Memory:
    """Read videos and questions, inside `passes.within`: -> memory f[B, M + L, C] of the decoder.

    Args:
      run: Bound model.
      video: Normalised video, f[B, T, S, S, 3].
      ids: int32[B, L], the questions.
      mask: int32[B, L].
      deterministic: False applies dropout.
    """
    tokens = run.encode_video(video, deterministic=deterministic)  # [B, M, C]
    states = run.encode_text(ids, mask, deterministic=deterministic)  # [B, L, C]
    seen, fused = run.fuse(states, mask, tokens, deterministic=deterministic)
    return mplug2.memory_of(seen, fused, mask)


def answer_loss(
    model: MPLUG2,
    params: Params,
    video: jax.Array,
    batch: Batch,
    mask: jax.Array,
    key: jax.Array | None,
    *,
    keep_logits: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cross-entropy of the answers' tokens.

    Args:
      model: The model.
      params: Its parameters.
      video: Normalised video, f[B, T, S, S, 3].
      batch: ids and mask int32[B, L], the questions; answer int32[B, A]: start token, words, end token, padding.
      mask: int32[B, A] of the answers, 1 up to the end token; all 0 drops a row.
      key: PRNG key of dropout, None in evaluation.
      keep_logits: `config.train.keep_logits`.

    Returns:
      (sum of the cross-entropies, number of targets, number of correctly predicted targets), float32 scalars.
    """
    calm = key is None

    def states_of(run: MPLUG2) -> jax.Array:
        memory = read(run, video, batch["ids"], batch["mask"], deterministic=calm)
        return run.decode(batch["answer"], None, memory, deterministic=calm)  # padding on the right is never seen

    def logits_of(states: jax.Array) -> jax.Array:
        return within(model, params, lambda run: run.logits(states))

    states = within(model, params, states_of, key)  # [B, A, C]
    return losses.next_token_of(logits_of, states[:, :-1], batch["answer"], mask, keep_logits=keep_logits)


def said(row: Mapping[str, np.ndarray], tokenizer: Tokenizer, listed: AnswerList | None) -> str:
    """The answer of a row of predictions."""
    return generation.text_of(tokenizer, row["generated"]) if listed is None else listed.texts[int(row["ranked"][0])]


def describe(
    row: Mapping[str, np.ndarray], record: Record, best: int, tokenizer: Tokenizer, listed: AnswerList | None
) -> Answer:
    """The answer of `predict answer` about one clip; from a list of answers, the `best` of them with their probabilities."""
    made: dict[str, Any] = {
        "video": record.media_id,
        "question": record.title,
        "answer": said(row, tokenizer, listed),
    }
    lines = [f"{record.media_id}: {record.title}", f"   {made['answer']}"]
    if listed is not None:
        ranked = list(zip(row["ranked"].tolist(), row["probabilities"].tolist(), strict=True))[:best]
        made["best"] = {listed.texts[number]: round(value, 4) for number, value in ranked}
        lines[1:] = [
            f"   {place}. {text}  ({value:.1%})" for place, (text, value) in enumerate(made["best"].items(), 1)
        ]
    return Answer(made, tuple(lines))


def report_of(
    rows: Sequence[Row], records: Split, tokenizer: Tokenizer, listed: AnswerList | None, new_tokens: int
) -> Report:
    """Scores and readable rows of N answers. Questions without an answer in the data are not scored.

    Args:
      rows: Predictions of N questions; "index" is the position in the split.
      records: Records of the split.
      tokenizer: Of the run.
      listed: The closed list, or None for generated answers.
      new_tokens: Most tokens of a generated answer.
    """
    answers: list[dict[str, Any]] = []
    beyond = 0
    for row in rows:
        record = records[int(row["index"])]
        text, right = said(row, tokenizer, listed), record.label_text
        one = {"index": int(row["index"]), "id": record.media_id, "question": record.title, "answer": text}
        one["references"] = [right] if right else []
        if right:
            wanted, spoken = (generation.as_generated(tokenizer, answer) for answer in (right, text))
            one |= {"exact": open_answers.exact(spoken, [wanted]), "contains": open_answers.contains(spoken, [wanted])}
            beyond += (right not in listed) if listed is not None else len(tokenizer.encode(right)) > new_tokens
        answers.append(one)
    told = [one for one in answers if one["references"]]
    found: dict[str, Any] = {
        "modalities": "video and question",
        "answering": "generated" if listed is None else "ranked",
        "questions": len(answers),
        "labelled": len(told),
    }
    if listed is not None:
        found |= {"answers": len(listed.texts), "unlisted": beyond}
    if not told:
        return Report(
            found | {"note": "this split has no answers: predictions are written, nothing is scored"}, answers
        )
    if beyond:
        why = "are not in the list" if listed is not None else f"have more than {new_tokens} tokens"
        found["note"] = f"{beyond} of the right answers {why}; such questions count as missed"
    shares = {name: open_answers.mean(one[name] for one in told) for name in ("exact", "contains")}
    return Report(found | shares, answers)
