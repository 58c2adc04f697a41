"""Rows of ids as text."""

import numpy as np

from ymplug_jax.tasks.common import preprocess


class Words:
    """One token starts, ends and pads, as in Qwen's tokenizer."""

    vocab_size, bos, eos, pad = 9, 0, 0, 0

    def encode(self, text: str) -> list[int]:
        return [int(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(str, ids))


def test_a_generated_row_that_ends_at_once_is_empty() -> None:
    """What follows its first end token means nothing, although that token also starts texts."""
    assert preprocess.decode(Words(), np.array([0, 5, 6, 0])) == ""
    assert preprocess.decode(Words(), np.array([5, 6, 0, 7])) == "56"
    row = preprocess.encode(Words(), "56", 6)
    assert row["ids"].tolist() == [0, 5, 6, 0, 0, 0] and row["mask"].tolist() == [1, 1, 1, 1, 0, 0]
    assert preprocess.decode(Words(), row["ids"][1:]) == "56"
