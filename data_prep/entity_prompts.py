"""Prompts of entities for ALPRO's teacher: a list of nouns, counted in the titles, set into templates.

    python -m data_prep.entity_prompts --entities nouns.txt --csv pretrain.csv --out prompts.json [--count 1000]

The list has one entity a line, its first word counts (so a frequency file will do). With --csv the ones that stand in most
titles are kept, without it the first ones. The file holds {"entities", "templates", "counts"}; a prompt is a template with an entity
in place of {}. The English templates of ALPRO are four nouns with three articles; the Chinese ones here are built alike and are
ours, because none were published.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

from data_prep.train_tokenizer import texts_of

TEMPLATES = {
    "zh": [
        f"{article}{{}}的{noun}" for noun in ("视频", "画面", "影像", "片段") for article in ("一段", "一个", "这段")
    ],
    "en": [
        f"{noun} {article} {{}}."
        for noun in ("A footage of", "A video of", "A portrait of", "A video footage of")
        for article in ("a", "the", "one")
    ],
}


def read_entities(path: Path) -> list[str]:
    """First word of every line that has one, each once, in order.

    Raises ValueError where there is none, or the file is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    found = list(dict.fromkeys(line.split()[0] for line in lines if line.split()))
    if not found:
        raise ValueError(f"{path}: no entity in it; write one a line")
    return found


def count_in(texts: Iterable[str], entities: Sequence[str]) -> Counter:
    """In how many texts each entity stands. Where one entity is part of another ("猫", "猫咪") both are counted."""
    longest = max(map(len, entities))
    known, counts = set(entities), Counter()
    for text in texts:
        pieces = {text[i : i + n] for n in range(1, longest + 1) for i in range(len(text) - n + 1)}
        counts.update(pieces & known)
    return counts


def choose(entities: Sequence[str], counts: Counter, count: int) -> list[str]:
    """The `count` most frequent ones, ties and zeros in the order of the list."""
    return sorted(entities, key=lambda entity: -counts[entity])[:count]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data_prep.entity_prompts", description=__doc__.splitlines()[0])
    parser.add_argument("--entities", type=Path, required=True, help="text file, one entity a line")
    parser.add_argument("--csv", type=Path, nargs="*", default=[], help="CSVs of the release to count in")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--count", type=int, default=1000, help="entities to keep (default 1000)")
    parser.add_argument("--language", choices=list(TEMPLATES), default="zh", help="of the templates")
    args = parser.parse_args(argv)
    try:
        entities, counts = read_entities(args.entities), Counter()
        if args.csv:
            texts = (text for path in args.csv for text in texts_of(path))
            with tqdm(texts, desc="counting", unit="text", file=sys.stderr) as bar:
                counts = count_in(bar, entities)
        chosen = choose(entities, counts, args.count)
        made = {
            "entities": chosen,
            "templates": TEMPLATES[args.language],
            "counts": [counts[entity] for entity in chosen] if args.csv else [],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        parser.exit(2, f"entity_prompts: {error}\n")
    print(
        f"{args.out}: {len(chosen)} entities, {len(made['templates'])} templates; config.model.entities={len(chosen)}"
    )
    if args.csv and (never := sum(counts[entity] == 0 for entity in chosen)):
        print(f"note: {never} of them stand in no title")


if __name__ == "__main__":
    main()
