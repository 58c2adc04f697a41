"""Caption metrics compared with stored outputs of the COCO toolkit, item by item, and edge cases."""

import json
from pathlib import Path

import pytest

from ymplug_jax.tasks.common import caption_metrics

SETS = json.loads((Path(__file__).parents[2] / "golden" / "metrics" / "coco.json").read_text(encoding="utf-8"))
SETS.pop("source")


@pytest.mark.parametrize("name", SETS)
def test_equal_to_the_toolkit(name: str):
    rows = SETS[name]["rows"]
    total, each = caption_metrics.score([row["prediction"] for row in rows], [row["references"] for row in rows])
    assert total == pytest.approx(SETS[name]["expected"], abs=1e-6)
    for metric in ("meteor", "rouge_l", "cider"):
        assert [values[metric] for values in each] == pytest.approx(SETS[name]["each"][metric], abs=1e-6), metric


def test_empty_and_non_chinese_captions_score_zero():
    total, each = caption_metrics.score(["", "hello 123", "一只猫"], [["一只猫"], ["一只狗"], ["一只猫"]])
    assert each[0]["cider"] == each[1]["rouge_l"] == each[1]["meteor"] == 0
    assert each[2]["rouge_l"] == 1 and 0 < total["bleu1"] < 1
    assert caption_metrics.score(["abc"], [["一"]])[0]["bleu4"] == 0


def test_items_without_references_are_refused():
    with pytest.raises(ValueError, match="one or more references"):
        caption_metrics.score(["一"], [[]])
    with pytest.raises(ValueError, match="0 predictions"):
        caption_metrics.score([], [])


def test_alignment_counts_chunks():
    assert caption_metrics.align(list("甲乙丙"), list("甲乙丙")) == (3, 0)
    assert caption_metrics.align(list("甲乙丙"), list("丙甲乙")) == (3, 2)
    assert caption_metrics.align(list("甲乙"), list("丙丁")) == (0, 0)
