"""Text on its way to the model: cleaning, tokenizers behind one small interface, and padding to a fixed length."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to ids and back. `encode` adds no special tokens, `decode` leaves them out."""

    vocab_size: int
    bos: int
    eos: int
    pad: int

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


def load_tokenizer(path: str) -> Tokenizer:
    """Tokenizer by file name: `*.model` sentencepiece, `*.json` Hugging Face (the GPT-3 of ModelScope included), `vocab.txt`
    BERT WordPiece.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, or one that cannot be read, or without the special tokens.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            f"tokenizer {path}: no such file; set config.data.tokenizer, or train one with python -m data_prep.train_tokenizer"
        )
    kinds = {".model": _SentencePiece, ".json": _HuggingFace, ".txt": _BertWordPiece}
    if file.suffix not in kinds:
        raise ValueError(
            f"tokenizer {path}: not a known kind; give *.model (sentencepiece), tokenizer.json or vocab.txt"
        )
    try:
        return kinds[file.suffix](str(file))
    except ValueError:
        raise
    except Exception as error:  # the libraries raise bare Exception and RuntimeError on broken files
        raise ValueError(f"tokenizer {path}: cannot be read as {file.suffix}: {error}") from error


class _SentencePiece:
    def __init__(self, path: str):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        self.vocab_size = self._model.vocab_size()
        self.bos, self.eos = self._model.bos_id(), self._model.eos_id()
        self.pad = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos
        if min(self.bos, self.eos) < 0:
            raise ValueError(f"tokenizer {path}: has no begin or end token; train it with bos_id and eos_id")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.bos, self.eos, self.pad)
        return self._model.decode([int(i) for i in ids if i not in special])


class _HuggingFace:
    # (begin, end, padding) as different models name them; the GPT-3 of ModelScope ends and pads with the same token.
    SPECIALS = (("<sep>", "<|endoftext|>", "<|endoftext|>"), ("<s>", "</s>", "<pad>"), ("[CLS]", "[SEP]", "[PAD]"))

    def __init__(self, path: str):
        import tokenizers

        self._model = tokenizers.Tokenizer.from_file(path)
        self._model.no_truncation()
        self._model.no_padding()
        self._special_ids(path)

    def _special_ids(self, path: str) -> None:
        self.vocab_size = self._model.get_vocab_size()
        for names in self.SPECIALS:
            ids = [self._model.token_to_id(name) for name in names]
            if None not in ids:
                self.bos, self.eos, self.pad = ids
                return
        wanted = " or ".join("/".join(dict.fromkeys(names)) for names in self.SPECIALS)
        raise ValueError(f"tokenizer {path}: has none of the known sets of special tokens ({wanted})")

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.bos, self.eos, self.pad)
        return self._model.decode([int(i) for i in ids if i not in special], skip_special_tokens=True)


class _BertWordPiece(_HuggingFace):
    def __init__(self, path: str):
        import tokenizers

        # Chinese characters are split one by one; what is not in the vocabulary becomes [UNK].
        self._model = tokenizers.BertWordPieceTokenizer(path, lowercase=True)
        self._special_ids(path)


def clean_text(text: str, max_words: int) -> str:
    """The reference's cleaning of titles and captions: lower case, ASCII punctuation out, at most `max_words` words by spaces.

    Chinese punctuation stays; a decimal point is lost (3.5 becomes 35).
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def encode_text(ids: Sequence[int], max_length: int, *, bos: int, eos: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), int32[max_length] each: begin, text, end, padding on the right; mask is 1 up to and including the end.

    A text that is too long keeps its first `max_length` ids, so its end token is lost, as in the reference.
    """
    row = [bos, *ids, eos][:max_length]
    return _padded(row, max_length, pad)


def encode_pair(
    prompt: Sequence[int], target: Sequence[int], max_length: int, *, bos: int, eos: int, pad: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids, mask, prompt_length) of begin, prompt, target, end: prompt_length counts the prompt's ids that were kept.

    If the whole is too long the prompt loses its tail, or the target does where the prompt alone cannot give enough; the
    end token always stays.
    """
    prompt, target = list(prompt), list(target)
    if len(prompt) + len(target) + 2 >= max_length:
        room = max_length - len(target) - 2
        if 0 <= room <= len(prompt):
            prompt = prompt[:room]
        else:
            prompt = prompt[: max_length - 2]
            target = target[: max_length - 2 - len(prompt)]
    ids, mask = _padded([bos, *prompt, *target, eos], max_length, pad)
    return ids, mask, len(prompt)


def _padded(row: list[int], max_length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full(max_length, pad, np.int32)
    ids[: len(row)] = row
    return ids, (np.arange(max_length) < len(row)).astype(np.int32)
