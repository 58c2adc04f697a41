"""Text on its way to the model and back: cleaning, tokenizers behind one small interface, padding to a fixed length.

Every text that a model reads begins with a start token, so that the first word is predicted from something:

    sentencepiece (*.model)       its beginning token, <s> as a rule
    GPT-3 of ModelScope           <sep>
    BLOOM and BLOOMZ              <s>
    BERT                          [CLS]
    Qwen2, Qwen2.5, Qwen3         <|endoftext|>, which also ends and pads: there is no beginning token, and <|endoftext|> stood
                                  before every document that the model was trained on, behind the one before
"""

import functools
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ymplug_jax.core import exits, text_files

if TYPE_CHECKING:
    import tokenizers


class Tokenizer(Protocol):
    """Text to ids and back, and picklable.

    `encode` adds no special tokens, and reads none out of the text: "<|endoftext|>" in a title is text. `decode` leaves
    special tokens out, and ids that the tokenizer does not have (a model may have more rows than its tokenizer tokens).
    """

    vocab_size: int  # ids are below this
    bos: int  # starts a text; equals eos where there is no beginning token
    eos: int
    pad: int  # may equal eos

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids."""
        ...

    def begins(self) -> str:
        """Which token starts a text, and why, in words for the log of a run."""
        ...


def load_tokenizer(path: str, *, lower_case: bool = True) -> Tokenizer:
    """Tokenizer by file name: `*.model` sentencepiece; `tokenizer.json` Hugging Face, where begin, end and padding are
    <sep>, <|endoftext|>, <|endoftext|> (the GPT-3 of ModelScope) or <s>, </s>, <pad> or [CLS], [SEP], [PAD] or all
    <|endoftext|> (Qwen, known by its <|im_start|> and <|im_end|>; the latter ends a turn of a chat, and no text here); `vocab.txt`
    BERT WordPiece, which `lower_case` has fold letters to lower case without accents: the id of a token is the number of its
    line from 0, an empty line is an id without a token, empty lines at the end do not count.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, or one that cannot be read, or without the special tokens, or with a token twice.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"tokenizer {path}: no such file; set config.data.tokenizer to a *.model (sentencepiece), tokenizer.json or "
            "vocab.txt, or train one with python -m data_prep.train_tokenizer"
        )
    kinds: dict[str, Callable[[str], Tokenizer]] = {
        ".model": _SentencePiece,
        ".json": _HuggingFace,
        ".txt": functools.partial(_BertWordPiece, lower_case=lower_case),
    }
    if file.suffix not in kinds:
        raise ValueError(
            f"tokenizer {path}: not a known kind; give a *.model (sentencepiece), tokenizer.json or vocab.txt"
        )
    with file.open("rb") as stream:
        head = stream.read(1024)
    if found := text_files.lfs_pointer(head) or text_files.web_page(head) or ("" if head else "empty; fetch it again"):
        raise ValueError(f"tokenizer {path}: {found}")
    try:
        made = kinds[file.suffix](str(file))
        _say(f"tokenizer {path}: {made.begins()}")
        return made
    except _Unfit as error:
        raise ValueError(f"tokenizer {path}: {error}") from None
    except exits.Mistake as error:
        raise ValueError(f"tokenizer {error}") from None
    except Exception as error:  # the libraries raise bare Exception, RuntimeError and others on broken files
        what = {".model": "a sentencepiece model", ".json": "a tokenizer.json", ".txt": "a BERT vocab.txt"}[file.suffix]
        raise ValueError(f"tokenizer {path}: cannot be read as {what}: {' '.join(str(error).split())}") from error


@functools.cache
def _say(line: str) -> None:
    """Log a line, once in a process."""
    logging.info("%s", line)


class _Unfit(ValueError):
    """A file that can be read but does not hold the tokens it needs; says which."""


class _SentencePiece:
    def __init__(self, path: str):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        self.vocab_size = self._model.vocab_size()
        self.bos, self.eos = self._model.bos_id(), self._model.eos_id()
        self.pad = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos
        if min(self.bos, self.eos) < 0:
            raise _Unfit("has no begin or end token; train it with bos_id and eos_id")

    def begins(self) -> str:
        """Which token starts a text, in words."""
        return f"a text starts with {self._model.id_to_piece(self.bos)} ({self.bos}), the beginning token"

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.bos, self.eos, self.pad)
        return self._model.decode([int(i) for i in ids if i not in special and 0 <= i < self.vocab_size])


class _HuggingFace:
    # (begin, end, padding) as different models name them.
    SPECIALS = (("<sep>", "<|endoftext|>", "<|endoftext|>"), ("<s>", "</s>", "<pad>"), ("[CLS]", "[SEP]", "[PAD]"))
    CHAT = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    )  # of Qwen, whose ordinary words may look like the others' specials

    def __init__(self, path: str):
        self._model = self._load(path)
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # read them as plain text
        ids = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1  # there may be gaps
        self.mask, self.unk = ids.get("[MASK]"), ids.get("[UNK]")  # None: the model masks no words
        if all(name in ids for name in self.CHAT):
            self.bos = self.eos = self.pad = ids[self.CHAT[0]]
            return
        for names in self.SPECIALS:
            if all(name in ids for name in names):
                self.bos, self.eos, self.pad = (ids[name] for name in names)
                return
        known = " or ".join("/".join(dict.fromkeys(names)) for names in (*self.SPECIALS, self.CHAT))
        raise _Unfit(f"has none of the known sets of special tokens ({known})")

    def _load(self, path: str) -> "tokenizers.Tokenizer":
        """The tokenizer with all of its control tokens marked as special, so that they are text where a user writes them. Qwen's
        <think> and <tool_call> are not so in the file."""
        import tokenizers

        model = json.loads(text_files.read_text(Path(path)))
        for token in model.get("added_tokens") or ():
            token["special"] |= re.fullmatch(r"<.+>|\[[A-Z]+\]", token["content"]) is not None
        return tokenizers.Tokenizer.from_str(json.dumps(model))

    def begins(self) -> str:
        """Which token starts a text, in words."""
        first = f"a text starts with {self._model.id_to_token(self.bos)} ({self.bos})"
        if self.bos != self.eos:
            return f"{first}, the beginning token"
        return f"{first}, the end of the text before it: there is no beginning token"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._model.encode_special_tokens = True  # pickling loses it

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.bos, self.eos, self.pad)
        return self._model.decode(
            [int(i) for i in ids if i not in special and 0 <= i < self.vocab_size], skip_special_tokens=True
        )


class _BertWordPiece(_HuggingFace):
    def __init__(self, path: str, lower_case: bool = True):
        self._lower_case = lower_case
        super().__init__(path)

    def _load(self, path: str) -> "tokenizers.Tokenizer":
        import tokenizers

        vocab: dict[str, int] = {}
        for i, token in enumerate(text_files.read_lines(Path(path))):
            if token in vocab:
                raise _Unfit(
                    f"the token {token!r} stands in line {vocab[token] + 1} and in line {i + 1}, so its id is not clear; put a "
                    "token that occurs nowhere else, such as [unused_again], into the line that the model was not trained with"
                )
            if token:
                vocab[token] = i
        if "[UNK]" not in vocab:
            raise _Unfit("has no [UNK]; it is no BERT vocabulary")
        model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
        # Chinese characters are split one by one.
        model.normalizer = tokenizers.normalizers.BertNormalizer(handle_chinese_chars=True, lowercase=self._lower_case)
        model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        model.decoder = tokenizers.decoders.WordPiece()
        model.add_special_tokens([token for token in ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]") if token in vocab])
        return model


def clean_text(text: str, max_words: int) -> str:
    """The reference's cleaning of titles and captions: lower case, ASCII punctuation out, at most `max_words` words by spaces.

    Chinese punctuation stays; a decimal point is lost (3.5 becomes 35).
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def clean_caption(decoded: str, prompt: str = "") -> str:
    """A caption from decoded text: what stands after the last occurrence of the prompt, all spaces deleted."""
    caption = decoded.replace(" ", "").strip()
    if prompt := prompt.replace(" ", "").strip():
        caption = caption.rpartition(prompt)[2]
    return caption


def encode_text(ids: Sequence[int], max_length: int, *, bos: int, eos: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids, mask), int32[max_length] each: begin, text, end, padding on the right; mask is 1 up to and including the end.

    A text that is too long keeps its first `max_length` ids, so its end token is lost, as in the reference.
    """
    return _padded([bos, *ids, eos][:max_length], max_length, pad)


def encode_words(
    ids: Sequence[int], max_length: int, *, bos: int, eos: int | None, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """`encode_text` of BERT's kind: a text that is too long loses its tail, never its end token; eos None: there is none."""
    end = [] if eos is None else [eos]
    return _padded([bos, *ids[: max_length - 1 - len(end)], *end], max_length, pad)


def encode_pair(
    prompt: Sequence[int], target: Sequence[int], max_length: int, *, bos: int, eos: int, pad: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """(ids, mask, prompt_length) of begin, prompt, target, end: prompt_length counts the prompt's ids that were kept.

    If the whole is too long the prompt loses its tail, or the target does where the prompt alone cannot give enough; the
    end token always stays. `max_length` is at least 2.
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
