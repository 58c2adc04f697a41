"""Trains a sentencepiece tokenizer on the texts of one or more CSVs of the release, or of text files.

    python -m data_prep.train_tokenizer --csv runs/corpus/pretrain_train.csv --out runs/titles.model --vocab 512

A unigram model (Kudo 2018) that gives every text back as it was: no normalisation, no added or removed spaces, and single
bytes for characters that it has not seen. (One exception: U+2581, sentencepiece's own mark of a space, comes back as a
space.) Ids: 0 pad, 1 bos, 2 eos, 3 unk, 4 to 259 the bytes, then the learned pieces.
"""

import io
import os
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from data_prep.captions import captions_of
from data_prep.flags import Parser, bar, local_path, run, write_bytes, write_text
from data_prep.tables import check_header, read_lines, read_table
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


def texts_of(path: Path, left_out: list[str] | None = None) -> Iterator[str]:
    """All texts of one CSV, or the lines of a .txt file; empty ones left out.

    Cells of golden_caption that the builder rejects are left out; `left_out` receives why, one entry each.
    Raises ValueError for an unknown header, text that is not UTF-8, or quotes that do not close.
    """
    if path.suffix == ".txt":
        yield from filter(None, read_lines(path))
        return
    table = read_table(path, (), [file for file, _ in COLUMNS.values()])
    _, header = next(table)
    kind = kind_of(path, header)
    check_header(path, header, (COLUMNS[kind][0], *COLUMNS[kind][1]))
    places = [header.index(column) for column in COLUMNS[kind][1]]
    for line, fields in table:
        for value in (fields[place] for place in places if place < len(fields)):
            if kind == "captioning":
                found, problem = captions_of(value)
                yield from found
                if problem and left_out is not None:
                    left_out.append(f"{path}, line {line}: {problem}")
            elif value:
                yield value


def train(texts: Iterator[str], vocab: int) -> bytes:
    """Trains a model of at most `vocab` pieces, as many as the texts support; returns the bytes of the .model file.

    Raises ValueError where there is no text, or `vocab` has no room for the bytes and the characters of the texts.
    """
    if vocab <= FIXED_PIECES:
        raise ValueError(f"--vocab {vocab}: {FIXED_PIECES} pieces are special tokens and bytes; give more")
    lines = (line for text in texts for line in text.split("\n") if line.strip())  # the trainer takes single lines
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


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one line on stderr for a mistake."""
    return run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = Parser("train_tokenizer", __doc__.splitlines()[0])
    parser.add_argument(
        "--csv", type=local_path, nargs="+", required=True, help="CSVs of the release, of any kind, or *.txt of lines"
    )
    parser.add_argument("--out", type=local_path, required=True, help="file to write, ending in .model")
    parser.add_argument("--vocab", type=int, default=512, help="pieces at most, 260 fixed ones included (default 512)")
    parser.add_argument(
        "--texts", type=local_path, help="also write the texts there, one a line, e.g. for configs/tiny/language.py"
    )
    args = parser.parse_args(argv)
    if args.out.suffix != ".model":
        raise ValueError(f"--out {args.out}: the name must end in .model")
    left_out: list[str] = []
    texts = (text for path in args.csv for text in texts_of(path, left_out))
    with bar(texts, "reading", "text") as read:
        model = train(iter(read), args.vocab)
    shares = shares_of(model, islice((text for path in args.csv for text in texts_of(path)), REPORTED))
    write_bytes(args.out, model)
    if args.texts:
        lines = (line for path in args.csv for text in texts_of(path) for line in text.split("\n") if line.strip())
        write_text(args.texts, "".join(f"{line}\n" for line in lines))
    if left_out:
        print(f"note: {len(left_out)} cells were left out; the first: {left_out[0]}", file=sys.stderr)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    print(f"{args.out}: {size} pieces, of them {size - FIXED_PIECES} learned")
    if size < args.vocab:
        print(f"note: the texts support {size} pieces, fewer than the {args.vocab} asked for")
    print(
        f"{shares.texts} texts: {shares.pieces / shares.texts:.2f} pieces a text, {shares.byte_pieces / shares.pieces:.2%}"
        f" bytes, {shares.unknown_pieces / shares.pieces:.2%} unknown; {shares.exact} decode exactly"
    )


if __name__ == "__main__":
    sys.exit(main())
