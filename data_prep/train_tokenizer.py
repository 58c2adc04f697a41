"""Train a sentencepiece tokenizer on the texts of Youku-mPLUG CSVs, of conversations or of text files.

    python -m data_prep.train_tokenizer --csv runs/corpus/pretrain_train.csv --out runs/titles.model --vocab 512

The tokenizer is a unigram model (Kudo 2018) that decodes every text exactly: no normalisation, no added or removed spaces, and
single bytes for unseen characters. The only exception is U+2581, sentencepiece's symbol for a space, which decodes to a space.
Ids: 0 pad, 1 bos, 2 eos, 3 unk, 4 to 259 the bytes, then the learned pieces.
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
from data_prep.conversations import read_talks
from data_prep.flags import Parser, bar, local_path, run, write_bytes, write_text
from data_prep.tables import check_header, read_lines, read_table
from ymplug_jax.data.schema import COLUMNS

PAD, BOS, EOS, UNK = range(4)
FIXED_PIECES = 4 + 256
LONGEST_PIECE = (
    4  # characters, about a Chinese word; longer pieces would merge words that often occur together in titles
)
SPACE = "\u2581"  # sentencepiece's symbol for a space
LONGEST_BYTES = 65536  # sentencepiece ignores longer texts
SAMPLE = 4_000_000  # maximum number of texts in memory; the trainer samples from more
REPORTED = 100_000  # number of texts for the printed statistics


class Shares(NamedTuple):
    """Statistics of a tokenizer on some texts, as counts."""

    texts: int
    pieces: int
    byte_pieces: int
    unknown_pieces: int
    exact: int  # texts that decode exactly


def kind_of(path: Path, header: list[str]) -> str:
    """Return the kind of CSV whose columns are all in the header; of several, the one with most columns.

    Raises:
      ValueError: the header fits no kind.
    """
    kinds = [kind for kind, (file, texts) in COLUMNS.items() if {file, *texts} <= set(header)]
    if not kinds:
        known = "; ".join(f"{kind}: {file},{','.join(texts)}" for kind, (file, texts) in COLUMNS.items())
        raise ValueError(
            f"{path}: unknown columns {','.join(header) or '(none)'}; give a CSV with the columns of one of {known}"
        )
    return max(kinds, key=lambda kind: len(COLUMNS[kind][1]))


def texts_of(path: Path, left_out: list[str] | None = None) -> Iterator[str]:
    """Yield all texts of a CSV, the lines of a .txt file or the conversations of a .jsonl or .json file, without empty ones.

    Args:
      path: path of the file.
      left_out: receives one message for each golden_caption cell or conversation that `build_shards` would reject. They are not
        yielded.

    Raises:
      ValueError: the header is unknown, the file is not UTF-8, or a quote is unbalanced.
    """
    if path.suffix == ".txt":
        yield from filter(None, read_lines(path))
        return
    if path.suffix in (".jsonl", ".json"):
        for talk in read_talks(path):
            if not talk.problem:
                yield talk.text
            elif left_out is not None:
                left_out.append(f"{path}, {talk.problem}")
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
    """Train a model of at most `vocab` pieces, limited by what the texts support.

    Returns:
      The content of the .model file.

    Raises:
      ValueError: there is no text, or `vocab` is too small for the bytes and characters of the texts.
    """
    if vocab <= FIXED_PIECES:
        raise ValueError(f"--vocab {vocab}: special tokens and bytes need {FIXED_PIECES} pieces; give more")
    lines = (line for text in texts for line in text.split("\n") if line.strip())  # the trainer expects single lines
    first = next(lines, None)
    if first is None:
        raise ValueError("--csv: the files hold no text; give files with texts")

    faults: list[ValueError] = []  # of the texts: the trainer would put its own words around them

    def all_lines() -> Iterator[str]:
        yield first
        try:
            yield from lines
        except ValueError as error:
            faults.append(error)
            raise

    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=all_lines(),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab,
            hard_vocab_limit=False,
            character_coverage=0.9995,  # rarer characters are encoded as bytes
            byte_fallback=True,
            required_chars=SPACE,  # a space encoded as bytes would decode to U+2581
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
        if faults:
            raise faults[0] from None
        # The trainer's message contains the required number of pieces.
        needed = re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error))
        if needed:
            raise ValueError(
                f"--vocab {vocab}: bytes and characters alone need {needed[1]} pieces; give more"
            ) from None
        raise ValueError(f"sentencepiece: {error}") from None
    return model.getvalue()


def shares_of(model: bytes, texts: Iterator[str]) -> Shares:
    """Tokenize the texts with the model and count."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    single_bytes = {i for i in range(processor.vocab_size()) if processor.is_byte(i)}
    counts = [0] * len(Shares._fields)
    for text in texts:
        ids = processor.encode(text)
        found = (1, len(ids), sum(i in single_bytes for i in ids), ids.count(UNK), int(processor.decode(ids) == text))
        counts = [count + more for count, more in zip(counts, found, strict=True)]
    return Shares(*counts)


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns exit code 0, or 2 after one error line on stderr."""
    return run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = Parser("train_tokenizer", __doc__.splitlines()[0])
    parser.add_argument(
        "--csv",
        type=local_path,
        nargs="+",
        required=True,
        help="Youku-mPLUG CSVs of any kind, *.jsonl files of conversations, or *.txt files with one text per line",
    )
    parser.add_argument("--out", type=local_path, required=True, help="file to write, ending in .model")
    parser.add_argument(
        "--vocab", type=int, default=512, help="maximum number of pieces, including 260 fixed ones (default 512)"
    )
    parser.add_argument(
        "--texts",
        type=local_path,
        help="also write the texts to this file, one per line, e.g. for configs/tiny/language.py",
    )
    args = parser.parse_args(argv)
    if args.out.suffix != ".model":
        raise ValueError(f"--out {args.out}: not the name of a .model file; give a name that ends in .model")
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
        print(f"note: {len(left_out)} cells or conversations were skipped; the first is {left_out[0]}", file=sys.stderr)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    print(f"{args.out}: {size} pieces, {size - FIXED_PIECES} of them learned")
    if size < args.vocab:
        print(f"note: the texts support {size} pieces only, fewer than --vocab {args.vocab}")
    print(
        f"{shares.texts} texts: {shares.pieces / shares.texts:.2f} pieces per text, {shares.byte_pieces / shares.pieces:.2%}"
        f" bytes, {shares.unknown_pieces / shares.pieces:.2%} unknown; {shares.exact} decode exactly"
    )


if __name__ == "__main__":
    sys.exit(main())
