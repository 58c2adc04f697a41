"""Label a benchmark with several people: sheets out, answers in, gold items, agreement, adjudication, and CSVs for build_shards.

    python -m data_prep.annotate sheets --kind classification --csv candidates.csv --gold gold.csv --video_root videos \\
        --annotators li wang zhao --each 3 --out sheets
    python -m data_prep.annotate merge --key sheets/key.json --answers answers-*.csv --out labelled

`sheets` writes a page and a CSV for each annotator, and key.json, which annotators must not see. `merge` drops annotators who make too
many errors on the gold items, takes the majority, and writes CSVs of the release's kinds and adjudication.csv with what the majority does
not decide. Give that file, answered, with --adjudicated. See docs/curate.md.

Exit codes: 0; 2 a mistake in flags or files.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from data_prep.annotation import answers as answer_files
from data_prep.annotation import items as items_lib
from data_prep.annotation import verdicts as verdicts_lib
from data_prep.annotation.answers import ADJUDICATOR
from data_prep.annotation.gold_test import BOUND, SIGNIFICANCE, GoldTest, table
from data_prep.annotation.items import KINDS, NO, Item, Key
from data_prep.annotation.split_groups import SPLITS, split_groups
from data_prep.annotation.verdicts import Verdict
from data_prep.curation.settings import Titles
from data_prep.curation.title_text import clean, compact
from data_prep.flags import MISTAKE, Parser, local_path, run, write_text
from data_prep.tables import read_lines
from ymplug_jax.data import schema

MOST_FRAMES = 16
PREFIX = {"classification": "classification", "pairs": "retrieval", "captions": "captioning"}  # of the release's files


class _Command(argparse.ArgumentParser):
    """Reports an error in one line, as `Parser` does."""

    def error(self, message: str) -> NoReturn:
        """Print the error in one line and exit."""
        self.exit(MISTAKE, f"error: {message}; --help lists the flags\n")


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns exit code 0, or 2 after one error line on stderr."""
    return run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = Parser("annotate", __doc__ or "")
    commands = parser.add_subparsers(required=True, metavar="{sheets,merge}", parser_class=_Command)
    _add_sheets(commands.add_parser("sheets", help="make the sheets of all annotators", allow_abbrev=False))
    _add_merge(commands.add_parser("merge", help="merge their answers", allow_abbrev=False))
    args = parser.parse_args(argv)
    args.run(args)


def _add_sheets(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--kind",
        choices=list(KINDS),
        required=True,
        help="what is asked: a class, whether a caption fits, or a caption",
    )
    add(
        "--csv",
        type=local_path,
        required=True,
        help="candidates, in the columns of docs/prepare_data.md; a label is not needed",
    )
    add("--gold", type=local_path, help="items whose answer is known: a label, or a column `answer` with yes or no")
    add("--video_root", type=local_path, required=True, help="folder of the videos")
    add("--annotators", nargs="+", required=True, metavar="NAME", help="names of the annotators")
    add("--each", type=int, default=3, help="answers to every item (default 3)")
    add(
        "--classes",
        type=local_path,
        help="classification: file of class names, one a line, instead of the 45 categories",
    )
    add(
        "--together",
        nargs="*",
        default=[],
        metavar="COLUMN",
        help="columns whose equal values keep clips in one split, e.g. source cluster",
    )
    add("--frames", type=int, default=8, help=f"frames shown of each clip, 1 to {MOST_FRAMES} (default 8)")
    add(
        "--error_bound",
        type=float,
        default=BOUND,
        help="error rate above which annotators are to be found (default 0.025)",
    )
    add("--seed", type=int, default=0, help="of the order and of who gets what (default 0)")
    add("--out", type=local_path, required=True, help="folder to write")
    parser.set_defaults(run=_sheets)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--key", type=local_path, required=True, help="key.json of the sheets")
    add(
        "--answers",
        type=local_path,
        nargs="+",
        required=True,
        metavar="FILE.csv",
        help="sheets with answers, one for each annotator",
    )
    add("--adjudicated", type=local_path, help="adjudication.csv with answers, which overrule")
    add(
        "--error_bound",
        type=float,
        default=BOUND,
        help="error rate on gold items above which annotators are dropped (default 0.025)",
    )
    add("--significance", type=float, default=SIGNIFICANCE, help="of the binomial test of the errors (default 0.05)")
    add("--least_share", type=float, default=0.5, help="share of the answers that a majority must exceed (default 0.5)")
    add("--captions", type=int, default=3, help="captions that a clip needs (default 3)")
    add(
        "--shares",
        type=float,
        nargs=3,
        default=[0.0, 0.5, 0.5],
        metavar=("TRAIN", "VAL", "TEST"),
        help="shares of the splits (default 0 0.5 0.5)",
    )
    add("--seed", type=int, default=0, help="of the splits (default 0)")
    add("--video_root", type=local_path, help="folder of the videos, for a page of the items to adjudicate")
    add("--out", type=local_path, required=True, help="folder to write")
    parser.set_defaults(run=_merge)


def _sheets(args: argparse.Namespace) -> None:
    from data_prep.annotation import sheet_page  # decodes

    if not 1 <= args.frames <= MOST_FRAMES:
        raise ValueError(f"--frames: {args.frames} is out of range; give 1 to {MOST_FRAMES}")
    _check_share("--error_bound", args.error_bound)
    if args.classes and args.kind != "classification":
        raise ValueError(f"--classes: --kind {args.kind} has no classes; leave --classes out")
    plain = [_plain(name) for name in args.annotators]
    if len(set(plain)) < len(plain) or ADJUDICATOR in args.annotators:
        raise ValueError(f"--annotators: two names make one file name, or one is {ADJUDICATOR!r}; give other names")
    if (args.out / "key.json").exists():
        raise ValueError(f"--out {args.out}: has sheets already; give another folder")
    classes: Sequence[str] = schema.CLASS_NAMES if args.kind == "classification" else ()
    if args.classes:
        classes = schema.parse_class_names("\n".join(read_lines(args.classes)), str(args.classes))
    asked = items_lib.read_candidates(args.csv, args.kind, args.seed, args.together)
    gold = items_lib.read_candidates(args.gold, args.kind, args.seed, (), gold=True) if args.gold else []
    frames, bad = sheet_page.read_frames([item.file for item in (*asked, *gold)], args.video_root, args.frames)
    if broken := next((item.file for item in gold if item.file in bad), None):
        raise ValueError(f"--gold: {broken}: {bad[broken]}; take it out of the gold items")
    if not (left := [item for item in asked if item.file not in bad]):
        raise ValueError(f"--video_root {args.video_root}: no clip of {args.csv} can be read; correct the folder")
    key = items_lib.make_key(args.kind, left, gold, args.annotators, args.each, classes, args.seed)
    write_text(args.out / "key.json", items_lib.as_json(key))  # first: sheets without their key are useless
    for name, own in key.given.items():
        listed = [key.items[one] for one in own]
        write_text(args.out / f"sheet-{_plain(name)}.csv", answer_files.sheet_csv(key, name, listed))
        write_text(args.out / f"sheet-{_plain(name)}.html", sheet_page.render(key, name, listed, frames))
    if bad:
        rows = [f"{json.dumps({'file': file, 'why': why}, ensure_ascii=False)}\n" for file, why in sorted(bad.items())]
        write_text(args.out / "unreadable.jsonl", "".join(rows))
    loads = [len(own) for own in key.given.values()]
    print(
        f"{args.out}: {len(left)} items and {key.golds} gold items for {len(loads)} annotators, {min(loads)} to {max(loads)} each"
    )
    if bad:
        print(
            f"{len(asked) - len(left)} items left out, because their clips cannot be read: {args.out / 'unreadable.jsonl'}"
        )
    if KINDS[args.kind].gold:
        print(table(GoldTest(key.golds, args.error_bound, SIGNIFICANCE)))
    print(f"not for the annotators: {args.out / 'key.json'}")


def _merge(args: argparse.Namespace) -> None:
    _check_share("--error_bound", args.error_bound)
    _check_share("--significance", args.significance)
    if not 0.5 <= args.least_share < 1:
        raise ValueError(f"--least_share: {args.least_share} is out of range; give 0.5 or more and less than 1")
    if args.captions < 1:
        raise ValueError(f"--captions: {args.captions} is too small; give 1 or more")
    shares = dict(zip(SPLITS, args.shares, strict=True))
    if min(args.shares) < 0 or abs(sum(args.shares) - 1) > 1e-6:
        raise ValueError(f"--shares: the sum of {args.shares} is not 1; give three shares such as 0.8 0.1 0.1")
    key = items_lib.read_key(args.key)
    if (old := args.out / "adjudication.csv").exists() and answer_files.read_adjudicated(old, key):
        raise ValueError(f"{old}: has answers, and would be overwritten; rename it and give it with --adjudicated")
    given = answer_files.read(args.answers, key)
    final = answer_files.read_adjudicated(args.adjudicated, key) if args.adjudicated else []
    people = verdicts_lib.judged(key, given, args.error_bound, args.significance)
    kept = [one for one in given if not people[one.annotator]["dropped"]]
    facts: dict[str, Any] = {"annotators": people, "answers": len(given), "answers_kept": len(kept), "gold": key.golds}
    if key.kind == "captions":
        found, facts["refused"] = verdicts_lib.captions(key, [*kept, *final], args.captions, Titles())
    else:
        facts["agreement_of_all"] = verdicts_lib.agreement(key, given)
        facts["agreement"] = verdicts_lib.agreement(key, kept)
        found = verdicts_lib.adjudicated(verdicts_lib.majorities(key, kept, args.least_share), final)
    decided = {name: one for name, one in found.items() if not one.reason}
    open_ones = {name: one for name, one in sorted(found.items()) if one.reason}
    facts |= {
        "items": len(found),
        "decided": len(decided),
        "to_adjudicate": {
            reason: sum(one.reason == reason for one in open_ones.values()) for reason in verdicts_lib.REASONS
        },
    }
    facts["splits"] = _write_release(args.out, key, decided, shares, args.seed)
    _write_adjudication(args.out, key, open_ones, args.video_root)
    write_text(args.out / "agreement.json", json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
    print(_text(args.out, key, facts))


def _write_release(
    out: Path, key: Key, decided: dict[str, Verdict], shares: dict[str, float], seed: int
) -> dict[str, int]:
    """Write a CSV for each split, and return their numbers of rows. Splits keep related clips together."""
    kind = KINDS[key.kind].schema
    file_column, texts = schema.COLUMNS[kind]
    rows = []
    for name, one in sorted(decided.items()):
        item = key.items[name]
        if key.kind == "pairs" and one.answers[0] == NO and not one.text:
            continue  # the caption does not describe the clip
        text = clean(one.text or item.text)
        cells = {
            "classification": [item.text, one.answers[0]],
            "pairs": [text],
            "captions": [repr(list(one.answers))],
        }[key.kind]
        rows.append((item, text if item.text else "", [item.file, *cells]))
    keys = [[*item.together, f"title:{compact(text)}" if text else ""] for item, text, _ in rows]
    splits = split_groups([item.file for item, _, _ in rows], keys, shares, seed) if rows else []
    counts = {}
    for split in shares:
        path = out / f"{PREFIX[key.kind]}_{split}.csv"
        own = [cells for (_, _, cells), chosen in zip(rows, splits, strict=True) if chosen == split]
        counts[split] = len(own)
        if own:
            write_text(path, _csv([file_column, *texts], own))
        else:
            path.unlink(missing_ok=True)
    return counts


def _write_adjudication(out: Path, key: Key, open_ones: dict[str, Verdict], root: Path | None) -> None:
    """Write the sheet of the items that need an adjudicator, or remove an old one."""
    csv_path, page = out / "adjudication.csv", out / "adjudication.html"
    if not open_ones:
        csv_path.unlink(missing_ok=True)
        page.unlink(missing_ok=True)
        return
    items = [_as_asked(key.items[name], one) for name, one in open_ones.items()]
    more = [{"reason": one.reason, "votes": one.votes} for one in open_ones.values()]
    write_text(csv_path, answer_files.sheet_csv(key, ADJUDICATOR, items, more))
    if root is None:
        page.unlink(missing_ok=True)
        return
    from data_prep.annotation import sheet_page  # decodes

    frames, _ = sheet_page.read_frames([item.file for item in items], root, 8)
    notes = [f"{verdicts_lib.REASONS[one.reason]}: {one.votes}" for one in open_ones.values()]
    write_text(page, sheet_page.render(key, ADJUDICATOR, items, frames, notes))


def _as_asked(item: Item, verdict: Verdict) -> Item:
    """The item as the adjudicator sees it: with the corrected text, if that is what is asked about."""
    return item._replace(text=verdict.text) if verdict.reason == "corrected" else item


def _csv(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([header, *rows])
    return out.getvalue()


def _text(out: Path, key: Key, facts: dict[str, Any]) -> str:
    """The results for a terminal."""
    lines = []
    for name, one in facts["annotators"].items():
        said = (
            f"{one['errors']} errors on {one['gold']} gold items"
            if one["gold"]
            else "no gold items answered, so errors are not known"
        )
        missing = len(key.given[name]) - one["answers"]
        power = (
            f"; a true rate of 10 % would be found with probability {one['power']['0.1']:.2f}" if one["gold"] else ""
        )
        lines.append(
            f"{name}: {one['answers']} answers{f', {missing} missing' if missing else ''}; {said}{' -> dropped' if one['dropped'] else ''}{power}"
        )
    if key.kind != "captions":
        for label, what in (("all answers", "agreement_of_all"), ("without dropped annotators", "agreement")):
            alpha = facts[what]["alpha"]
            lines.append(
                f"agreement, {label}: alpha {'not defined' if alpha is None else f'{alpha:.3f}'} over {facts[what]['items']} items"
            )
    waiting = {reason: count for reason, count in facts["to_adjudicate"].items() if count}
    lines.append(
        f"{facts['decided']} of {facts['items']} items decided; rows: {', '.join(f'{k} {v}' for k, v in facts['splits'].items())}"
    )
    if waiting:
        told = ", ".join(f"{count} {reason}" for reason, count in waiting.items())
        lines.append(f"to adjudicate: {told}; answer {out / 'adjudication.csv'} and give it with --adjudicated")
    return "\n".join(lines)


def _check_share(flag: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{flag}: {value} is out of range; give more than 0 and less than 1")


def _plain(name: str) -> str:
    """A name as part of a file name."""
    return "".join(one if one.isalnum() or one == "-" else "_" for one in name)


if __name__ == "__main__":
    sys.exit(main())
