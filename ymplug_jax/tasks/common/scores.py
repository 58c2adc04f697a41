"""Descriptions of the scores shared by several tasks: labels, units and whether higher is better."""

import re
from collections.abc import Sequence

from ymplug_jax.tasks.presentation import Score

DIRECTIONS = {"v2t": "video to text", "t2v": "text to video"}
WORDS = {"cider": "CIDEr", "meteor": "METEOR", "rouge_l": "ROUGE-L", "r_mean": "mean of the recalls"}


def losses(*names: str) -> tuple[Score, ...]:
    """Mean cross-entropies, in nats."""
    return tuple(Score(name, label(name), unit="nats", higher_is_better=False) for name in names)


def shares(*names: str) -> tuple[Score, ...]:
    """Fractions from 0 to 1, shown as percentages."""
    return tuple(Score(name, label(name), unit="%", factor=100) for name in names)


def recalls(*groups: str) -> tuple[Score, ...]:
    """The scores of `task_metrics.recalls` for each group; the group "" has no heading of its own."""
    found: list[Score] = []
    for group in groups:
        prefix = f"{group}/" if group else ""
        for side, words in DIRECTIONS.items():
            under = f"{group}, {words}" if group else words
            shown = ("r1", "r5", "r10", "r_mean")
            found += [Score(f"{prefix}{side}_{name}", label(name), under, "%") for name in shown]
            found += [
                Score(f"{prefix}{side}_{name}", label(name), under, higher_is_better=False)
                for name in ("mean_rank", "median_rank")
            ]
        found.append(Score(f"{prefix}r_mean", label("r_mean"), group, "%"))
    return tuple(found)


def votes(modalities: Sequence[str], by: Sequence[str]) -> tuple[Score, ...]:
    """Top-1 and top-5 accuracy in percent for each modality and kind of vote."""
    return tuple(
        Score(f"{group}/{kind}_top{k}", label(f"{kind}_top{k}"), group, "%")
        for group in modalities
        for kind in by
        for k in (1, 5)
    )


def captions() -> tuple[Score, ...]:
    """The scores of `caption_metrics.score`."""
    bleu = tuple(f"bleu{n}" for n in range(1, 5))
    return (*shares(*bleu, "meteor", "rouge_l"), Score("cider", label("cider")))


def label(name: str) -> str:
    """Display label of a score's name without its group: "r5" -> "R@5", "likelihood_top1" -> "likelihood top-1"."""
    name = re.sub(r"^r(\d+)$", r"R@\1", name)
    name = re.sub(r"_?top(\d+)$", r" top-\1", name)
    name = re.sub(r"^bleu(\d)$", r"BLEU-\1", name)
    return WORDS.get(name, name.replace("_", " ").strip())
