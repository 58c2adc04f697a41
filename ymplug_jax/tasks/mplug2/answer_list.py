"""A closed list of answers for video question answering. See docs/models/mplug2.md, "Ranking answers"."""

import dataclasses

import numpy as np

from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.text import Tokenizer
from ymplug_jax.models.bert_decoder import Decoder
from ymplug_jax.tasks.common import preprocess
from ymplug_jax.tasks.mplug2 import inputs

SETTING = "config.options.answers"


@dataclasses.dataclass(frozen=True)
class AnswerList:
    """Different answers with their tokens; `text in answers` says whether one of them has the tokens of the text."""

    source: str  # the file
    texts: tuple[str, ...]  # A answers, as their first lines write them
    ids: np.ndarray  # int32[A, L]: start token, words, end token, padding
    mask: np.ndarray  # int32[A, L], 1 at tokens
    rows: dict[tuple[int, ...], int]  # words -> row
    tokenizer: Tokenizer

    @classmethod
    def read(cls, path: str, tokenizer: Tokenizer) -> "AnswerList":
        """Read a file of answers, one per line. Lines with the same tokens, such as Red and red, are one answer.

        Raises:
          Mistake: The file cannot be read, has an empty or a repeated line, or a line that the tokenizer cannot express or tell apart from
            another; the message names the line.
        """
        texts: list[str] = []
        rows: dict[tuple[int, ...], int] = {}
        lines: dict[tuple[int, ...], int] = {}
        for number, text in enumerate(preprocess.names_in(path, SETTING, "answer"), 1):
            words = tuple(tokenizer.encode(text))
            if not words:
                raise Mistake(
                    f"{SETTING} {path}, line {number}: the tokenizer leaves nothing of {text!r}; remove the line"
                )
            if words in rows and getattr(tokenizer, "unk", None) in words:
                raise Mistake(
                    f"{SETTING} {path}, line {number}: {text!r} has a word that the tokenizer does not know, and so the same tokens as "
                    f"line {lines[words]}; remove one of them"
                )
            if words not in rows:
                rows[words], lines[words] = len(texts), number
                texts.append(text)
        length = 2 + max(map(len, rows))
        each = [inputs.encode(tokenizer, words, length) for words in rows]
        ids, mask = (np.stack([one[name] for one in each]) for name in ("ids", "mask"))
        return cls(path, tuple(texts), ids, mask, rows, tokenizer)

    def __contains__(self, text: str) -> bool:
        return tuple(self.tokenizer.encode(text)) in self.rows

    def check_room(self, decoder: Decoder) -> None:
        """Check that the decoder can read the longest answer.

        Raises:
          Mistake: It cannot; the message names the answer.
        """
        if self.ids.shape[1] > decoder.max_positions:
            longest = self.texts[int(self.mask.sum(axis=1).argmax())]
            raise Mistake(
                f"{SETTING} {self.source}: the answer {longest!r} has {self.ids.shape[1]} tokens with start and end token, but "
                f"config.model.decoder.max_positions is {decoder.max_positions}; remove it"
            )
