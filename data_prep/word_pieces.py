"""Train a BERT vocabulary (WordPiece) on the texts of Youku-mPLUG CSVs or of text files.

    python -m data_prep.word_pieces --csv runs/corpus/pretrain_train.csv --out runs/vocab.txt --vocab 512

For runs from random initialisation; a run with the weights of bert-base-chinese needs the vocab.txt of bert-base-chinese. The file
has one token per line, and the id of a token is its line number from 0: [PAD], [UNK], [CLS], [SEP], [MASK], then characters and
learned pieces. Chinese characters are single tokens, as in BERT.
"""

import sys
from collections.abc import Iterable

import tokenizers

from data_prep.flags import Parser, bar, local_path, run, write_text
from data_prep.train_tokenizer import texts_of

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train(texts: Iterable[str], vocab: int) -> list[str]:
    """Train at most `vocab` tokens and return them in the order of their ids. Rare characters are dropped if necessary.

    Raises:
      ValueError: there is no text, or `vocab` leaves no room for characters.
    """
    if vocab <= len(SPECIALS):
        raise ValueError(f"--vocab {vocab}: special tokens need {len(SPECIALS)}; give more")
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    model.normalizer = tokenizers.normalizers.BertNormalizer(handle_chinese_chars=True, lowercase=True)
    model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    room = vocab - len(SPECIALS)
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab, special_tokens=list(SPECIALS), show_progress=False, limit_alphabet=room
    )
    model.train_from_iterator(texts, trainer)
    found = model.get_vocab()
    if len(found) == len(SPECIALS):
        raise ValueError("--csv: the files hold no text; give files with texts")
    return sorted(found, key=found.__getitem__)[:vocab]


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns exit code 0, or 2 after one error line on stderr."""
    return run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = Parser("word_pieces", __doc__.splitlines()[0])
    parser.add_argument(
        "--csv",
        type=local_path,
        nargs="+",
        required=True,
        help="Youku-mPLUG CSVs of any kind, or *.txt files with one text per line",
    )
    parser.add_argument("--out", type=local_path, required=True, help="file to write, ending in .txt")
    parser.add_argument("--vocab", type=int, default=512, help="maximum number of tokens (default 512)")
    args = parser.parse_args(argv)
    if args.out.suffix != ".txt":
        raise ValueError(f"--out {args.out}: not the name of a .txt file; give a name that ends in .txt")
    left_out: list[str] = []
    texts = (text for path in args.csv for text in texts_of(path, left_out))
    with bar(texts, "reading", "text") as read:
        tokens = train(iter(read), args.vocab)
    write_text(args.out, "".join(f"{token}\n" for token in tokens))
    if left_out:
        print(f"note: {len(left_out)} cells were skipped; the first is {left_out[0]}", file=sys.stderr)
    print(f"{args.out}: {len(tokens)} tokens")


if __name__ == "__main__":
    sys.exit(main())
