"""Decoding of token rows."""

import numpy as np

from ymplug_jax.tasks.common import preprocess


class Words:
    """Start, end and padding are the same token, as in Qwen's tokenizer."""

    vocab_size, bos, eos, pad = 9, 0, 0, 0

    def encode(self, text: str) -> list[int]:
        return [int(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(str, ids))


def test_a_row_that_starts_with_the_end_token_is_empty() -> None:
    """Tokens after the first end token are ignored, although that token also starts texts."""
    assert preprocess.decode(Words(), np.array([0, 5, 6, 0])) == ""
    assert preprocess.decode(Words(), np.array([5, 6, 0, 7])) == "56"
    row = preprocess.encode(Words(), "56", 6)
    assert row["ids"].tolist() == [0, 5, 6, 0, 0, 0] and row["mask"].tolist() == [1, 1, 1, 1, 0, 0]
    assert preprocess.decode(Words(), row["ids"][1:]) == "56"
