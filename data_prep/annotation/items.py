"""What people are asked: items of three kinds, who gets which, and the key that tells them apart afterwards."""

import hashlib
import json
import random
from collections.abc import Sequence
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.tables import read_table
from ymplug_jax.data import schema

FORMAT = "ymplug_jax annotation key 1"
YES, NO = "yes", "no"


class Kind(NamedTuple):
    """A kind of question."""

    schema: str  # kind of the CSV that results, see schema.COLUMNS
    shown: str  # column of the candidates whose text is shown
    gold: str  # column of the right answer in a file of gold items, "" if the kind has none
    question: str  # on the page


KINDS = {
    "classification": Kind("classification", "title", "label", "这段视频属于哪一类？Which category is this video?"),
    "pairs": Kind("retrieval", "caption", "answer", "这句话描述的是这段视频吗？Does the text describe the video?"),
    "captions": Kind("captioning", "", "", "用一句话描述这段视频。Describe the video in one sentence."),
}


class Item(NamedTuple):
    """One clip, with a text for kinds that show one."""

    name: str  # drawn from the seed; says nothing about the item
    file: str
    text: str
    gold: str  # right answer, "" for an item whose answer is asked for
    together: tuple[str, ...]  # keys of the item for `split_groups`


class Key(NamedTuple):
    """What a set of sheets asks. It stays with whoever hands out the sheets."""

    kind: str
    seed: int
    classes: tuple[str, ...]  # answers of a classification
    each: int  # answers to every item that is no gold item
    items: dict[str, Item]
    given: dict[str, tuple[str, ...]]  # annotator -> names of the items, in the order of the sheet

    @property
    def golds(self) -> int:
        """Number of gold items, which all annotators get."""
        return sum(bool(item.gold) for item in self.items.values())


def read_candidates(csv_file: Path, kind: str, seed: int, together: Sequence[str], gold: bool = False) -> list[Item]:
    """Read candidate or gold items from a CSV.

    Args:
      csv_file: columns of the release's kind; a label is needed in a file of gold items only.
      kind: one of KINDS.
      seed: of the names.
      together: columns whose equal values keep clips in one split.
      gold: the file holds gold items.

    Raises:
      ValueError: an error of `read_table`, an empty file name, an item twice, or a gold item without an answer; names the line.
    """
    about = KINDS[kind]
    file_column = schema.COLUMNS[about.schema][0]
    if gold and not about.gold:
        raise ValueError(f"--gold {csv_file}: items of --kind {kind} have no right answer; leave --gold out")
    needed = [file_column, *filter(None, [about.shown, about.gold if gold else ""]), *together]
    table = read_table(csv_file, list(dict.fromkeys(needed)), (file_column,))
    _, header = next(table)
    items: dict[str, Item] = {}
    for line, fields in table:
        if len(fields) != len(header):
            raise ValueError(
                f"{csv_file}, line {line}: {len(fields)} fields, but the header has {len(header)}; correct it"
            )
        row = dict(zip(header, (field.strip() for field in fields), strict=True))
        file, text = row[file_column], row[about.shown] if about.shown else ""
        answer = row[about.gold] if gold else ""
        if not file or (kind == "pairs" and not text):
            raise ValueError(
                f"{csv_file}, line {line}: no {'caption' if file else 'file'}; write it or remove the line"
            )
        if gold and not answer:
            raise ValueError(f"{csv_file}, line {line}: a gold item without {about.gold}; write the right answer")
        name = _name(seed, file, text if kind == "pairs" else "")
        if name in items:
            raise ValueError(f"{csv_file}, line {line}: {file} for the second time; keep one line for each item")
        items[name] = Item(
            name, file, text, answer, tuple(f"{column}:{row[column]}" for column in together if row[column])
        )
    if not items:
        raise ValueError(f"{csv_file}: no rows after the header; give a CSV with at least one row")
    return list(items.values())


def _name(seed: int, file: str, text: str) -> str:
    return hashlib.sha256(json.dumps([seed, file, text]).encode()).hexdigest()[:12]


def make_key(
    kind: str,
    items: Sequence[Item],
    gold: Sequence[Item],
    annotators: Sequence[str],
    each: int,
    classes: Sequence[str],
    seed: int,
) -> Key:
    """Decide who gets which item, and in which order.

    Every item goes to `each` annotators. Loads differ by at most one item, and the groups of annotators change from block to block so
    that all pairs of annotators meet. All gold items go to everybody, shuffled among the others.

    Raises:
      ValueError: too few annotators, a repeated annotator, an item that is also a gold item, or a gold answer that is none.
    """
    if len(set(annotators)) < len(annotators):
        raise ValueError("--annotators: a name occurs twice; give every annotator another name")
    if not 1 <= each <= len(annotators):
        raise ValueError(
            f"--each: {each} answers an item from {len(annotators)} annotators; give 1 to {len(annotators)}"
        )
    if twice := {item.name for item in items} & {item.name for item in gold}:
        file = next(item.file for item in gold if item.name in twice)
        raise ValueError(f"--gold: {file} is also a candidate; its answer is known, so remove it from --csv")
    for item in gold:
        check_answer(item.gold, kind, classes, f"--gold: {item.file}")
    rng = random.Random(f"{seed}:{kind}")
    order = sorted(items, key=lambda item: item.name)
    rng.shuffle(order)
    lists: dict[str, list[str]] = {name: [item.name for item in gold] for name in annotators}
    block = len(annotators) // gcd(each, len(annotators))  # items after which all loads are equal
    turn = list(annotators)
    for number, item in enumerate(order):
        if number % block == 0:
            rng.shuffle(turn)
        start = number % block * each
        for place in range(start, start + each):
            lists[turn[place % len(turn)]].append(item.name)
    for name in annotators:
        lists[name].sort()
        random.Random(f"{seed}:{name}").shuffle(lists[name])
    every = {item.name: item for item in (*order, *gold)}
    return Key(kind, seed, tuple(classes), each, every, {name: tuple(own) for name, own in lists.items()})


def check_answer(answer: str, kind: str, classes: Sequence[str], where: str) -> None:
    """Raise ValueError if a text is no answer to a question of this kind; the message begins with `where`."""
    if kind == "classification" and answer not in classes:
        raise ValueError(f"{where}: {answer!r} is not among the {len(classes)} class names; correct it")
    if kind == "pairs" and answer not in (YES, NO):
        raise ValueError(f"{where}: {answer!r} is neither {YES} nor {NO}; correct it")


def as_json(key: Key) -> str:
    """The key as the text of its file."""
    facts: dict[str, Any] = {**key._asdict(), "items": [item._asdict() for item in key.items.values()]}
    return json.dumps({"format": FORMAT, **facts}, ensure_ascii=False, indent=1) + "\n"


def read_key(file: Path) -> Key:
    """Read the file that `as_json` describes.

    Raises:
      ValueError: it is no such file, or it is damaged.
      OSError: it cannot be read.
    """
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        facts = None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise ValueError(f"{file}: not a key of annotation sheets; give the key.json that was written with the sheets")
    try:
        items = [Item(**{**one, "together": tuple(one["together"])}) for one in facts["items"]]
        given = {name: tuple(own) for name, own in facts["given"].items()}
        every = {one.name: one for one in items}
        key = Key(facts["kind"], facts["seed"], tuple(facts["classes"]), facts["each"], every, given)
        whole = key.kind in KINDS and all(name in every for own in given.values() for name in own)
    except (KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(f"{file}: damaged; give the key.json that was written with the sheets")
    return key
