"""Build the entity prompts of ALPRO's teacher from a list of nouns and templates.

    python -m data_prep.entity_prompts --entities nouns.txt --csv pretrain.csv --out prompts.json [--count 1000] [--images]

The list has one entity per line; only the first word of a line is used, so a word frequency file works too. With --csv the
entities that occur in most titles are kept, otherwise the first ones. The output file holds {"entities", "templates", "counts"};
a prompt is a template with an entity in place of {}. ALPRO's English templates combine four nouns with three articles. No Chinese
templates were published; those used here have the same form. With --images the templates are those of still images. See
docs/models/alpro.md, "Entity prompts".
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_prep.flags import Parser, bar, local_path, run, write_text
from data_prep.tables import read_lines
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
# Prompts of still images, for pre-training on batches of images and of clips.
IMAGE_TEMPLATES = {
    "zh": [
        f"{article}{{}}的{noun}"
        for noun in ("照片", "图片", "清晰照片", "清晰图片")
        for article in ("一张", "一幅", "这张")
    ],
    "en": [
        f"{noun} {article} {{}}."
        for noun in ("A photo of", "A picture of", "A good photo of", "A good picture of")
        for article in ("a", "the", "one")
    ],
}


def read_entities(path: Path) -> list[str]:
    """Return the first word of every line, without duplicates, in order.

    Raises:
      ValueError: the file holds no entity or is not UTF-8.
    """
    words = (re.split("[ \t\u3000]+", line.strip(), maxsplit=1)[0] for line in read_lines(path))
    found = list(dict.fromkeys(filter(None, words)))
    if not found:
        raise ValueError(f"{path}: no entity in it; write one per line")
    return found


def count_in(texts: Iterable[str], entities: Sequence[str]) -> Counter[str]:
    """Count the texts that contain each entity. An entity inside another one ("猫" in "猫咪") is counted too."""
    longest = max(map(len, entities))
    known = set(entities)
    counts: Counter[str] = Counter()
    for text in texts:
        pieces = {text[i : i + n] for n in range(1, longest + 1) for i in range(len(text) - n + 1)}
        counts.update(pieces & known)
    return counts


def choose(entities: Sequence[str], counts: Counter[str], count: int) -> list[str]:
    """Return the `count` most frequent entities, with ties in the order of the list."""
    return sorted(entities, key=lambda entity: -counts[entity])[:count]


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns exit code 0, or 2 after one error line on stderr."""
    return run(lambda: _main(argv))


def _main(argv: list[str] | None) -> None:
    parser = Parser("entity_prompts", __doc__.splitlines()[0])
    parser.add_argument("--entities", type=local_path, required=True, help="text file with one entity per line")
    parser.add_argument(
        "--csv", type=local_path, nargs="*", default=[], help="CSVs of Youku-mPLUG whose texts are counted"
    )
    parser.add_argument("--out", type=local_path, required=True, help="JSON file to write")
    parser.add_argument("--count", type=int, default=1000, help="number of entities to keep (default 1000)")
    parser.add_argument(
        "--language", choices=list(TEMPLATES), default="zh", help="language of the templates (default zh)"
    )
    parser.add_argument("--images", action="store_true", help="write the prompts of still images instead of clips")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise ValueError(f"--count {args.count}: too small; give 1 or more")
    entities = read_entities(args.entities)
    counts: Counter[str] = Counter()
    if args.csv:
        texts = (text for path in args.csv for text in texts_of(path))
        with bar(texts, "counting", "text") as read:
            counts = count_in(read, entities)
    chosen = choose(entities, counts, args.count)
    templates = (IMAGE_TEMPLATES if args.images else TEMPLATES)[args.language]
    made = {
        "entities": chosen,
        "templates": templates,
        "counts": [counts[entity] for entity in chosen] if args.csv else [],
    }
    write_text(args.out, json.dumps(made, ensure_ascii=False, indent=1) + "\n")
    print(f"{args.out}: {len(chosen)} entities, {len(templates)} templates; config.model.entities={len(chosen)}")
    if args.csv and (never := sum(counts[entity] == 0 for entity in chosen)):
        print(f"note: {never} of them occur in no text")


if __name__ == "__main__":
    sys.exit(main())
