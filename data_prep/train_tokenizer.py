"""Trains a sentencepiece tokenizer on the texts of one or more CSVs of the release, or of text files.

    python -m data_prep.train_tokenizer --csv runs/corpus/pretrain_train.csv --out runs/titles.model --vocab 512

A unigram model (Kudo 2018) that gives every text back as it was: no normalisation, no added or removed spaces, and single
bytes for characters that it has not seen. (One exception: U+2581, sentencepiece's own mark of a space, comes back as a
space.) Ids: 0 pad, 1 bos, 2 eos, 3 unk, 4 to 259 the bytes, then the learned pieces.
"""

import argparse
import ast
import csv
import io
import os
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from tqdm import tqdm

from ymplug_jax.data.schema import COLUMNS

PAD, BOS, EOS, UNK = range(4)
FIXED_PIECES = 4 + 256
LONGEST_PIECE = 4  # characters: a Chinese word; longer pieces glue words together where titles are alike
SPACE = "\u2581"  # a space, inside sentencepiece
LONGEST_BYTES = 65536  # longer texts are left out by sentencepiece
SAMPLE = 4_000_000  # texts that the trainer keeps in memory, chosen at random where there are more
REPORTED = 100_000  # texts that the printed shares come from


class Shares(NamedTuple):
    """How a tokenizer splits some texts. Counts of texts and pieces."""

    texts: int
    pieces: int
    byte_pieces: int
    unknown_pieces: int
    exact: int  # texts that decode to themselves


def kind_of(path: Path, header: list[str]) -> str:
    """Which kind of CSV this header belongs to: the one with the most columns. Raises ValueError for none."""
    kinds = [kind for kind, (file, texts) in COLUMNS.items() if {file, *texts} <= set(header)]
    if not kinds:
        known = "; ".join(f"{kind}: {file},{','.join(texts)}" for kind, (file, texts) in COLUMNS.items())
        raise ValueError(f"{path}: columns {','.join(header) or '(none)'} are of no known CSV; expected one of {known}")
    return max(kinds, key=lambda kind: len(COLUMNS[kind][1]))


def captions_of(value: str) -> list[str]:
    """The texts of one captioning cell: a list of references in validation, a plain text in training."""
    if value.startswith("["):
        try:
            items = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return [value]
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return items
    return [value]


def texts_of(path: Path) -> Iterator[str]:
    """All texts of one CSV, or the lines of a .txt file; empty ones left out.

    Raises ValueError for an unknown header or text that is not UTF-8.
    """
    csv.field_size_limit(2**31 - 1)
    with open(path, newline="", encoding="utf-8-sig") as stream:
        try:
            if path.suffix == ".txt":
                yield from filter(None, (line.rstrip("\r\n") for line in stream))
                return
            rows = csv.DictReader(stream)
            kind = kind_of(path, list(rows.fieldnames or ()))
            for row in rows:
                for column in COLUMNS[kind][1]:
                    value = row[column] or ""
                    yield from filter(None, captions_of(value) if kind == "captioning" else [value])
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert it first") from None
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}") from None


def train(texts: Iterator[str], vocab: int) -> bytes:
    """Trains a model of at most `vocab` pieces, as many as the texts support; returns the bytes of the .model file.

    Raises ValueError where there is no text, or `vocab` has no room for the bytes and the characters of the texts.
    """
    if vocab <= FIXED_PIECES:
        raise ValueError(f"--vocab {vocab}: {FIXED_PIECES} pieces are special tokens and bytes; give more")
    lines = (line for text in texts for line in text.splitlines() if line.strip())  # the trainer takes single lines
    first = next(lines, None)
    if first is None:
        raise ValueError("--csv: there is no text in the given files")

    def all_lines() -> Iterator[str]:
        yield first
        yield from lines

    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=all_lines(),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab,
            hard_vocab_limit=False,
            character_coverage=0.9995,  # rarer characters are spelled in bytes
            byte_fallback=True,
            required_chars=SPACE,  # spelled in bytes, a space would come back as U+2581
            max_sentencepiece_length=LONGEST_PIECE,
            add_dummy_prefix=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            pad_id=PAD,
            bos_id=BOS,
            eos_id=EOS,
            unk_id=UNK,
            max_sentence_length=LONGEST_BYTES,
            input_sentence_size=SAMPLE,
            shuffle_input_sentence=True,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,  # errors only
        )
    except RuntimeError as error:
        # The trainer's message names the number of characters that must fit.
        needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if needed:
            raise ValueError(
                f"--vocab {vocab}: bytes and characters alone take {needed[1]} pieces; give more"
            ) from None
        raise ValueError(f"sentencepiece: {error}") from None
    return model.getvalue()


def shares_of(model: bytes, texts: Iterator[str]) -> Shares:
    """Splits the texts with the model and counts."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    single_bytes = {i for i in range(processor.vocab_size()) if processor.is_byte(i)}
    counts = [0] * len(Shares._fields)
    for text in texts:
        ids = processor.encode(text)
        found = (1, len(ids), sum(i in single_bytes for i in ids), ids.count(UNK), int(processor.decode(ids) == text))
        counts = [count + more for count, more in zip(counts, found, strict=True)]
    return Shares(*counts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.train_tokenizer", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--csv", type=Path, nargs="+", required=True, help="CSVs of the release, of any kind, or *.txt of lines"
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write, ending in .model")
    parser.add_argument("--vocab", type=int, default=512, help="pieces at most, 260 fixed ones included (default 512)")
    parser.add_argument(
        "--texts", type=Path, help="also write the texts there, one a line, e.g. for configs/tiny/language.py"
    )
    args = parser.parse_args(argv)
    if args.out.suffix != ".model":
        parser.exit(2, f"train_tokenizer: --out {args.out}: the name must end in .model\n")
    try:
        texts = (text for path in args.csv for text in texts_of(path))
        with tqdm(texts, desc="reading", unit="text", file=sys.stderr) as bar:
            model = train(iter(bar), args.vocab)
        shares = shares_of(model, islice((text for path in args.csv for text in texts_of(path)), REPORTED))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        partial = args.out.with_name(f".{args.out.name}.partial")
        partial.write_bytes(model)
        partial.replace(args.out)
        if args.texts:
            lines = (line for path in args.csv for text in texts_of(path) for line in text.splitlines() if line.strip())
            args.texts.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.exit(2, f"train_tokenizer: {error}\n")
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    print(f"{args.out}: {size} pieces, of them {size - FIXED_PIECES} learned")
    if size < args.vocab:
        print(f"note: the texts support {size} pieces, fewer than the {args.vocab} asked for")
    print(
        f"{shares.texts} texts: {shares.pieces / shares.texts:.2f} pieces a text, {shares.byte_pieces / shares.pieces:.2%}"
        f" bytes, {shares.unknown_pieces / shares.pieces:.2%} unknown; {shares.exact} decode exactly"
    )


if __name__ == "__main__":
    main()
