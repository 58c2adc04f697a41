"""Scores of candidate answers to one prompt. The video and the prompt are prefilled once; each answer is a branch of the cache."""

from collections.abc import Sequence

import jax
import numpy as np

from ymplug_jax.data import text
from ymplug_jax.data.text import Tokenizer
from ymplug_jax.models import decode, language_model
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.tasks.task import Example


def encode(tokenizer: Tokenizer, prompt: str, answers: Sequence[list[int]], length: int) -> Example:
    """Encode a prompt with K answers for `scores`.

    Each pair of prompt and answer is truncated on its own, as in the reference. The prompt then is the part that all K rows share.

    Args:
      tokenizer: Tokenizer of the language model.
      prompt: Text between the start token and the answer.
      answers: K answers as token ids.
      length: L, the row length that pairs are truncated to.

    Returns:
      {"prompt": int32[L], "shared": int32, "branches": int32[K, W], "targets": bool[K, W]}, W = longest answer + 1.
    """
    ids = tokenizer.encode(prompt)
    special = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.pad}
    pairs = [text.encode_pair(ids, answer, length, **special) for answer in answers]
    rows, masks, lengths = (np.stack(part) for part in zip(*pairs, strict=True))
    return split(rows, masks, lengths, max(len(answer) for answer in answers) + 1)


def split(rows: np.ndarray, masks: np.ndarray, prompt_lengths: np.ndarray, width: int) -> Example:
    """Split rows of prompt and answer into the arrays that `encode` returns.

    Args:
      rows: int32[K, L], token ids.
      masks: int32[K, L], 1 up to and including the end token.
      prompt_lengths: int32[K], prompt tokens after the start token.
      width: W, the width of the branches.
    """
    shared = 1 + int(prompt_lengths.min())  # includes the start token; all prompts are prefixes of one text
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
    """Summed log-probability of each answer, including its end token.

    Args:
      lm: The language model, unbound.
      params: Its parameters.
      prefix: f[B, Q, H] or None.
      batch: The arrays of `encode` with a leading axis B.

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
