"""Scoring of candidate answers after one prompt: the video and the prompt are read once, each answer is a branch of them."""

from collections.abc import Sequence

import jax
import numpy as np

from ymplug_jax.data import text
from ymplug_jax.data.text import Tokenizer
from ymplug_jax.models import decode, language_model
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.tasks.task import Example


def encode(tokenizer: Tokenizer, prompt: str, answers: Sequence[list[int]], length: int) -> Example:
    """A prompt with K answers as the arrays that `scores` takes.

    Every pair is truncated by the pair rule by itself, as the reference does; what all K rows then share is the prompt.

    Args:
      tokenizer: of the language model.
      prompt: text between the start token and the answer.
      answers: K answers as ids.
      length: L, the row length that truncation goes by.

    Returns:
      {"prompt": int32[L], "shared": int32, "branches": int32[K, W], "targets": bool[K, W]}, W = longest answer + 1.
    """
    ids = tokenizer.encode(prompt)
    special = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    pairs = [text.encode_pair(ids, answer, length, **special) for answer in answers]
    rows, masks, lengths = (np.stack(part) for part in zip(*pairs, strict=True))
    return split(rows, masks, lengths, max(len(answer) for answer in answers) + 1)


def split(rows: np.ndarray, masks: np.ndarray, prompt_lengths: np.ndarray, width: int) -> Example:
    """`encode` from rows of prompt and answer: int32[K, L], int32[K, L], int32[K] -> the arrays of `encode` with W = width."""
    shared = 1 + int(prompt_lengths.min())  # the start token included; prompts are cut from one text
    ends = masks.sum(axis=1)
    branches = np.full((len(rows), width), rows[0, 0], np.int32)
    targets = np.zeros((len(rows), width), bool)
    for k, (row, end, own) in enumerate(zip(rows, ends, prompt_lengths, strict=True)):
        part = row[shared:end]
        branches[k, : len(part)] = part
        targets[k, own + 1 - shared : len(part)] = True
    return {
        "prompt": rows[0].astype(np.int32),
        "shared": np.array(shared, np.int32),
        "branches": branches,
        "targets": targets,
    }


def scores(lm: LanguageModel, params: dict, prefix: jax.Array | None, batch: dict[str, jax.Array]) -> jax.Array:
    """Summed log-probability of each answer with its end token.

    Args:
      lm: the language model, unbound.
      params: its parameters.
      prefix: f[B, Q, H] or None.
      batch: the arrays of `encode`, each with a leading B.

    Returns:
      f32[B, K].
    """
    embeds, mask = decode.prompt_of(lm, params, prefix, batch["prompt"], batch["shared"])
    hidden, past = lm.apply({"params": params}, embeds, mask, method="prefill")
    last = language_model.last_state(hidden, mask)  # [B, D]
    return decode.branch_scores(lm, params, past, batch["branches"], batch["targets"], last)


def probabilities(log_likelihood: jax.Array) -> jax.Array:
    """Softmax over the candidates: f32[..., K] -> f32[..., K]."""
    return jax.nn.softmax(log_likelihood, axis=-1)
