"""Text processing: cleaning, tokenizers with a common interface, and padding to a fixed length.

Every text begins with a start token, from which the model predicts the first token:

    sentencepiece (*.model)       its beginning-of-sequence token, usually <s>
    GPT-3 of ModelScope           <sep>
    BLOOM and BLOOMZ              <s>
    BERT                          [CLS]
    Qwen2, Qwen2.5, Qwen3         <|endoftext|>, which also ends and pads a text. Qwen has no beginning token, and in its training
                                  data <|endoftext|> separates documents, so it precedes each of them

See docs/models/language_models.md, "Tokenizers", and docs/models/mplug_video.md, "Text input".
"""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ymplug_jax.core import exits, place_copies, text_files

if TYPE_CHECKING:
    import tokenizers


class Tokenizer(Protocol):
    """Interface of a tokenizer. Implementations are picklable.

    `encode` neither adds special tokens nor recognises them in the text: "<|endoftext|>" in a title is plain text. `decode` drops
    special tokens, and ids beyond the vocabulary (an embedding table may have more rows than the tokenizer has tokens).
    """

    vocab_size: int  # all ids are smaller
    bos: int  # starts a text; equals eos if the tokenizer has no beginning token
    eos: int
    pad: int  # may equal eos

    def encode(self, text: str) -> list[int]:
        """Convert a text to ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Convert ids to a text."""
        ...

    def begins(self) -> str:
        """Describe the token that starts a text, for the log of a run."""
        ...


def load_tokenizer(path: str, *, lower_case: bool = True) -> Tokenizer:
    """Load a tokenizer, chosen by the file name.

    `*.model` is sentencepiece. `tokenizer.json` is a Hugging Face tokenizer, whose begin, end and padding tokens are one of
    <sep>, <|endoftext|>, <|endoftext|> (GPT-3 of ModelScope); <s>, </s>, <pad>; [CLS], [SEP], [PAD]; or <|endoftext|> for all
    three (Qwen, recognised by <|im_start|> and <|im_end|>, which mark chat turns and are not used here). `vocab.txt` is BERT
    WordPiece: the id of a token is its line number from 0, an empty line reserves an id, and empty lines at the end are ignored.

    Args:
      path: path of the file, local or in a bucket.
      lower_case: for `vocab.txt`, lower-case the text and strip accents.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: the file is of another kind, cannot be read, lacks special tokens, or holds a token twice.
    """
    missing = (
        f"tokenizer {path}: no such file; set config.data.tokenizer to a *.model (sentencepiece), tokenizer.json or "
        "vocab.txt, or train a tokenizer with python -m data_prep.train_tokenizer"
    )
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(place_copies.local_copy(path, "config.data.tokenizer"))
        except FileNotFoundError:
            raise FileNotFoundError(missing) from None
        if not file.is_file():
            raise FileNotFoundError(missing)
        return _loaded(path, file, lower_case)


def _loaded(path: str, file: Path, lower_case: bool) -> Tokenizer:
    """Load the tokenizer in a local `file`; messages name `path`."""
    kinds: dict[str, Callable[[str], Tokenizer]] = {
        ".model": _SentencePiece,
        ".json": _HuggingFace,
        ".txt": functools.partial(_BertWordPiece, lower_case=lower_case),
    }
    if file.suffix not in kinds:
        raise ValueError(
            f"tokenizer {path}: unknown file type; give a *.model (sentencepiece), tokenizer.json or vocab.txt"
        )
    with file.open("rb") as stream:
        head = stream.read(1024)
    if (
        found := text_files.lfs_pointer(head)
        or text_files.web_page(head)
        or ("" if head else "empty; download it again")
    ):
        raise ValueError(f"tokenizer {path}: {found}")
    try:
        return kinds[file.suffix](str(file))
    except _Unfit as error:
        raise ValueError(f"tokenizer {path}: {error}") from None
    except exits.Mistake as error:
        raise ValueError(f"tokenizer {error}") from None
    except Exception as error:  # the libraries raise bare Exception, RuntimeError and others on damaged files
        what = {".model": "a sentencepiece model", ".json": "a tokenizer.json", ".txt": "a BERT vocab.txt"}[file.suffix]
        raise ValueError(
            f"tokenizer {path}: cannot be read as {what} ({' '.join(str(error).split())}); choose another file"
        ) from error


class _Unfit(ValueError):
    """A readable file without the required tokens. The message names them."""


class _SentencePiece:
    def __init__(self, path: str):
        import sentencepiece

        self._model = sentencepiece.SentencePieceProcessor(model_file=path)
        self.vocab_size = self._model.vocab_size()
        self.bos, self.eos = self._model.bos_id(), self._model.eos_id()
        self.pad = self._model.pad_id() if self._model.pad_id() >= 0 else self.eos
        if min(self.bos, self.eos) < 0:
            raise _Unfit("has no begin or end token; train it with bos_id and eos_id set")

    def begins(self) -> str:
        """Describe the token that starts a text."""
        return f"a text starts with {self._model.id_to_piece(self.bos)} ({self.bos}), the beginning token"

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        special = (self.bos, self.eos, self.pad)
        return self._model.decode([int(i) for i in ids if i not in special and 0 <= i < self.vocab_size])


class _HuggingFace:
    # (begin, end, padding) tokens of different models.
    SPECIALS = (("<sep>", "<|endoftext|>", "<|endoftext|>"), ("<s>", "</s>", "<pad>"), ("[CLS]", "[SEP]", "[PAD]"))
    # Qwen, checked first: its ordinary vocabulary may contain the special tokens of other models.
    CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

    def __init__(self, path: str):
        self._model = self._load(path)
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # encode them as plain text
        ids = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1  # ids may have gaps
        self.mask, self.unk = ids.get("[MASK]"), ids.get("[UNK]")  # None: the vocabulary has no such token
        if all(name in ids for name in self.CHAT):
            self.bos = self.eos = self.pad = ids[self.CHAT[0]]
            return
        for names in self.SPECIALS:
            if all(name in ids for name in names):
                self.bos, self.eos, self.pad = (ids[name] for name in names)
                return
        known = " or ".join("/".join(dict.fromkeys(names)) for names in (*self.SPECIALS, self.CHAT))
        raise _Unfit(f"has none of the known sets of special tokens; give a tokenizer with {known}")

    def _load(self, path: str) -> "tokenizers.Tokenizer":
        """Load the tokenizer with all control tokens marked as special, so that they are plain text in a user's text.

        Qwen's file does not mark <think> and <tool_call> as special.
        """
        import tokenizers

        model = json.loads(text_files.read_text(Path(path)))
        for token in model.get("added_tokens") or ():
            token["special"] |= re.fullmatch(r"<.+>|\[[A-Z]+\]", token["content"]) is not None
        return tokenizers.Tokenizer.from_str(json.dumps(model))

    def begins(self) -> str:
        """Describe the token that starts a text."""
        first = f"a text starts with {self._model.id_to_token(self.bos)} ({self.bos})"
        if self.bos != self.eos:
            return f"{first}, the beginning token"
        return f"{first}, the end-of-text token, since the tokenizer has no beginning token"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state
        self._model.encode_special_tokens = True  # not preserved by pickling

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
                    f"the token {token!r} is in line {vocab[token] + 1} and in line {i + 1}, so its id is ambiguous; replace the "
                    "line that the model was not trained with by a token that occurs nowhere else, such as [unused_again]"
                )
            if token:
                vocab[token] = i
        if "[UNK]" not in vocab:
            raise _Unfit("has no [UNK], so it is not a BERT vocabulary; choose another file")
        model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
        # Each Chinese character becomes a word of its own.
        model.normalizer = tokenizers.normalizers.BertNormalizer(handle_chinese_chars=True, lowercase=self._lower_case)
        model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        model.decoder = tokenizers.decoders.WordPiece()
        model.add_special_tokens([token for token in ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]") if token in vocab])
        return model


def clean_text(text: str, max_words: int) -> str:
    """Clean a title or caption as the reference does: lower-case, remove ASCII punctuation, keep at most `max_words` words.

    Words are separated by spaces. Chinese punctuation is kept; decimal points are removed, so 3.5 becomes 35.
    """
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def clean_caption(decoded: str, prompt: str = "", language: str = "zh") -> str:
    """Extract a caption from decoded text: the part after the last occurrence of the prompt.

    Args:
      decoded: Text that a tokenizer decoded.
      prompt: Text before the caption.
      language: "zh" removes all spaces; any other keeps single spaces between words.
    """

    def spaced(text: str) -> str:
        return text.replace(" ", "").strip() if language == "zh" else " ".join(text.split())

    caption, prompt = spaced(decoded), spaced(prompt)
    return caption.rpartition(prompt)[2].lstrip(" ") if prompt else caption


def encode_text(ids: Sequence[int], max_length: int, *, bos: int, eos: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, mask), int32[max_length] each: begin, text, end and right padding. The mask is 1 up to the end token.

    A text that is too long is cut to its first `max_length` ids and loses its end token, as in the reference.
    """
    return _padded([bos, *ids, eos][:max_length], max_length, pad)


def encode_words(
    ids: Sequence[int], max_length: int, *, bos: int, eos: int | None, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """`encode_text` as for BERT: a text that is too long is cut before the end token, which is kept. eos None: no end token."""
    end = [] if eos is None else [eos]
    return _padded([bos, *ids[: max_length - 1 - len(end)], *end], max_length, pad)


def encode_pair(
    prompt: Sequence[int], target: Sequence[int], max_length: int, *, bos: int, eos: int, pad: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return (ids, mask, prompt_length) of begin, prompt, target, end, where prompt_length counts the prompt ids that are kept.

    If the sequence is too long, the end of the prompt is cut; if that is not enough, the prompt is kept as far as it fits
    and the target is cut. The end token is always kept. `max_length` is at least 2.
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
