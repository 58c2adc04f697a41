"""Evaluation of the chat model on conversations: open answers by greedy search, options by likelihood, and the control runs.

The last answer of each conversation is asked for. See docs/models/mplug_chat.md, "Evaluation".
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import conversation
from ymplug_jax.data.records import Record, Split
from ymplug_jax.data.text import Tokenizer
from ymplug_jax.models import decode, language_model
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.tasks.common import open_answers, task_metrics
from ymplug_jax.tasks.mplug_chat import answer_scores
from ymplug_jax.tasks.mplug_chat import questions as questions_lib
from ymplug_jax.tasks.mplug_chat.questions import BLACK, OTHER, Others, Question, Questions
from ymplug_jax.tasks.task import Batch, Example, Report, Row

Place = Callable[[np.ndarray], np.ndarray]  # ids of a row with IMAGE and VIDEO at the slots -> int32[n], its `index`


def prompt_of(record: Record, tokenizer: Tokenizer, slots: int, length: int, place: Place) -> Example:
    """The prompt of a record's last answer.

    It stands at the right end of its row, so that the rows of a batch give the tokens of single rows.

    Args:
      record: A record of a conversation.
      tokenizer: Tokenizer of the language model.
      slots: Q + 1, the slots of an image or clip.
      length: L, the width of the row.
      place: Says which media vector each position holds, or -1.

    Returns:
      prompt_ids int32[L], prompt_index int32[L], prompt_mask bool[L], asked bool. `asked` is False where the record has no answer
      or a prompt longer than L: the row then holds the beginning token alone and is not scored.
    """
    asked = questions_lib.last_answer(record.text)
    ids = conversation.for_answering(asked.prompt, tokenizer, slots) if asked else np.zeros(0, np.int32)
    fits = 0 < len(ids) <= length
    ids = ids if fits else np.array([tokenizer.bos], np.int32)
    start = length - len(ids)
    row, index = np.full(length, tokenizer.pad, np.int32), np.full(length, -1, np.int32)
    row[start:], index[start:] = np.maximum(ids, 0), place(ids)
    mask = np.arange(length) >= start
    return {"prompt_ids": row, "prompt_index": index, "prompt_mask": mask, "asked": np.array(fits)}


def options_of(record: Record, tokenizer: Tokenizer, choices: int, tokens: int) -> Example:
    """The options of a record of `Questions` as token ids, each with its end token.

    Args:
      record: A record whose `options` are to be scored; it may have none.
      tokenizer: Tokenizer of the language model.
      choices: K, the most options of a question.
      tokens: W, the most tokens of an option, end token included; 2 or more.

    Returns:
      branches int32[K, W], targets bool[K, W]; an option that does not exist has no target.

    Raises:
      Mistake: The record has more than K options, or one of more than W tokens.
    """
    if len(record.options) > choices:
        raise Mistake(
            f"{record.media_id}: {len(record.options)} options, but config.options.choices is {choices}; raise it to "
            f"{len(record.options)}"
        )
    branches, targets = np.full((choices, tokens), tokenizer.pad, np.int32), np.zeros((choices, tokens), bool)
    for row, text in enumerate(record.options):
        ids = [*tokenizer.encode(text), tokenizer.eos]
        if len(ids) > tokens:
            raise Mistake(
                f"{record.media_id}: the option {text!r} has {len(ids)} tokens with its end token, but "
                f"config.options.choice_tokens is {tokens}; raise it to {len(ids)}"
            )
        branches[row, : len(ids)], targets[row, : len(ids)] = ids, True
    return {"branches": branches, "targets": targets}


def check_room(lm: LanguageModel, length: int, new_tokens: int, choice_tokens: int) -> None:
    """Check that answers and options fit after a prompt of `length` tokens.

    Raises:
      Mistake: The model has fewer positions.
    """
    for name, tokens in (("new_tokens", new_tokens), ("choice_tokens", choice_tokens)):
        if lm.max_positions is not None and length + tokens > lm.max_positions:
            raise Mistake(
                f"config.options.{name}: {tokens} after a prompt of config.data.max_tokens {length} exceeds "
                f"config.model.llm.max_positions {lm.max_positions}; lower one of the first two"
            )


def answers(
    lm: LanguageModel, params: dict, embeds: jax.Array, batch: Batch, new_tokens: int, eos: int
) -> dict[str, jax.Array]:
    """Predictions of a batch: the greedy answer, and the likelihood of each option.

    Args:
      lm: The language model, unbound.
      params: Its parameters.
      embeds: f[B, L, H], the prompts with their media.
      batch: prompt_mask bool[B, L] and asked bool[B]; branches int32[B, K, W] and targets bool[B, K, W] if options are scored.
      new_tokens: N, most tokens of an answer.
      eos: The end token.

    Returns:
      generated int32[B, N], to be cut at the end token; likelihood f32[B, K] and tokens int32[B, K] of `likelihoods`; asked and
      valid bool[B].
    """
    mask = batch["prompt_mask"]
    made = {"generated": decode.greedy(lm, params, embeds, mask, new_tokens=new_tokens, eos=eos).ids}
    if "branches" in batch:
        made |= likelihoods(lm, params, embeds, mask, batch["branches"], batch["targets"])
    return made | {"asked": batch["asked"], "valid": batch["valid"]}


def likelihoods(
    lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array, branches: jax.Array, targets: jax.Array
) -> dict[str, jax.Array]:
    """Log-probability of each option and its number of tokens, end token included.

    Args:
      lm: The language model, unbound.
      params: Its parameters.
      embeds: f[B, L, H], prompts.
      mask: bool[B, L].
      branches: int32[B, K, W].
      targets: bool[B, K, W].

    Returns:
      "likelihood" f32[B, K], 0 for an option that does not exist, and "tokens" int32[B, K].
    """
    hidden, past = lm.apply({"params": params}, embeds, mask, method="prefill")
    last = language_model.last_state(hidden, mask)
    found = decode.branch_scores(lm, params, past, branches, targets, last)
    tokens = jnp.sum(targets, axis=-1, dtype=jnp.int32)
    return {"likelihood": jnp.where(tokens > 0, found, 0), "tokens": tokens}


def text_of(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    """The answer of generated ids: without the end token, as one line."""
    kept = ids.tolist()
    kept = kept[: kept.index(tokenizer.eos)] if tokenizer.eos in kept else kept
    return " ".join(tokenizer.decode(kept).split())


def views(records: Split, tokenizer: Tokenizer, choices: int, tokens: int) -> dict[str, Split]:
    """The split with the options of its questions, and the controls; see `questions.views` and `options_of`."""

    def fits(text: str) -> bool:
        return len(tokenizer.encode(text)) + 1 <= tokens

    return questions_lib.views(Questions(records, choices, fits))


def report(rows: list[Row], records: Split, tokenizer: Tokenizer) -> Report:
    """Scores and readable rows of an evaluation.

    Records that show the same media and ask the same after the same turns are one question with several right answers; the answer
    to the first of them counts.

    Args:
      rows: "generated" int32[N], "asked", and with options "likelihood" f32[K] and "tokens" int32[K]; of each control the same
        names followed by "/black" or "/other".
      records: The split that `views` returns under "".
      tokenizer: Tokenizer of the language model.

    Raises:
      Mistake: A likelihood is not finite; the message names the first such example.
    """
    assert isinstance(records, Questions)
    keys = [key for key in (rows[0] if rows else ()) if key.partition("/")[0] == "likelihood"]
    task_metrics.check_rows(rows, records, *keys)
    others = Others(records)
    found: dict[tuple[object, ...], dict[str, Any]] = {}
    without, too_long = 0, 0
    for row in rows:
        question = records.questions[int(row["index"])]
        if question is None or question.asked is None:
            without += 1
        elif not row["asked"]:
            too_long += 1
        elif answer := found.get(question.key):
            answer["references"].append(question.asked.answer)
        else:
            found[question.key] = _answer(row, question, records, others, tokenizer)
    answers = list(found.values())
    for answer in answers:
        _judge(answer)
    scores = answer_scores.of(answers)
    if without:
        scores["without_answer"] = without
    if too_long:
        scores["too_long"] = too_long
    return Report(scores, answers)


def _answer(row: Row, question: Question, records: Questions, others: Others, tokenizer: Tokenizer) -> dict[str, Any]:
    """Readable row of one question, not yet judged."""
    assert question.asked is not None
    index = int(row["index"])
    donors = others.donors(index) if question.media else None
    made: dict[str, Any] = {
        "index": index,
        "id": records[index].media_id,
        "kind": question.kind,
        "question": question.asked.question,
        "references": [question.asked.answer],
        "media": list(question.names),
    }
    if question.options:
        made["options"] = list(question.options)
    if donors:
        made |= {"other": donors[0][0], "other_media": [_name(records, *donor) for donor in donors]}
    shown = ["", *([BLACK] if question.media else []), *([OTHER] if donors else [])]
    for run in shown:
        end = f"/{run}" if run else ""
        if f"generated{end}" not in row:
            continue  # an evaluation without this control
        made[f"answer{end}"] = text_of(row[f"generated{end}"], tokenizer)
        if question.options and f"likelihood{end}" in row:
            count = len(question.options)
            made[f"likelihood{end}"] = [float(value) for value in row[f"likelihood{end}"][:count]]
            made["option_tokens"] = [int(value) for value in row[f"tokens{end}"][:count]]
    return made


def _name(records: Questions, index: int, position: int) -> str:
    question = records.questions[index]
    assert question is not None
    return question.names[position]


def _judge(answer: dict[str, Any]) -> None:
    """Add the verdicts of every run to a readable row: "exact", "contains", "choice", "choice_total" and "chosen"."""
    answer["references"] = references = open_answers.distinct(answer["references"])
    right = {open_answers.normal(text) for text in references}
    for end in ("", f"/{BLACK}", f"/{OTHER}"):
        if f"answer{end}" in answer:
            answer[f"exact{end}"] = open_answers.exact(answer[f"answer{end}"], references)
            answer[f"contains{end}"] = open_answers.contains(answer[f"answer{end}"], references)
        if f"likelihood{end}" in answer:
            totals = np.array(answer[f"likelihood{end}"])
            correct = np.array([open_answers.normal(text) in right for text in answer["options"]])
            each = totals / np.maximum(answer["option_tokens"], 1)
            answer[f"choice{end}"], answer[f"choice_total{end}"] = _first(each, correct), _first(totals, correct)
            answer[f"chosen{end}"] = answer["options"][_winner(each, correct)]


def _first(scores: np.ndarray, right: np.ndarray) -> bool:
    """Whether a right option ranks first: f[K], bool[K]. Ties count against the model."""
    return bool(right.any()) and int(task_metrics.ranks_in(scores[None], right[None])[0]) == 1


def _winner(scores: np.ndarray, right: np.ndarray) -> int:
    """The chosen option: of those that tie for the highest score, the first wrong one, else the first."""
    best: Sequence[int] = np.flatnonzero(scores == scores.max()).tolist()
    return next((option for option in best if not right[option]), best[0])
