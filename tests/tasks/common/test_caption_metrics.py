"""Caption metrics compared with stored outputs of the COCO toolkit, item by item, and edge cases."""

import json
from pathlib import Path

import pytest

from ymplug_jax.tasks.common import caption_metrics, english_tokens

GOLDEN = Path(__file__).parents[2] / "golden" / "metrics"
SETS = json.loads((GOLDEN / "coco.json").read_text(encoding="utf-8"))
SETS.pop("source")
ENGLISH = json.loads((GOLDEN / "coco_english.json").read_text(encoding="utf-8"))
DRAWN = json.loads((GOLDEN / "coco_english_drawn.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SETS)
def test_equal_to_the_toolkit(name: str):
    rows = SETS[name]["rows"]
    total, each = caption_metrics.score([row["prediction"] for row in rows], [row["references"] for row in rows])
    assert total == pytest.approx(SETS[name]["expected"], abs=1e-6)
    for metric in ("meteor", "rouge_l", "cider"):
        assert [values[metric] for values in each] == pytest.approx(SETS[name]["each"][metric], abs=1e-6), metric


def test_english_tokens_are_the_toolkits():
    texts = [(row["prediction"], row["tokens"]) for row in ENGLISH["rows"]]
    for row in ENGLISH["rows"]:
        texts += zip(row["references"], row["reference_tokens"], strict=True)
    assert len(texts) == 200
    for text, expected in texts:
        assert english_tokens.tokens(text) == expected, text


def test_english_tokens_of_drawn_captions_are_the_toolkits():
    assert len(DRAWN["equal"]) == 300
    for text, expected in DRAWN["equal"]:
        assert english_tokens.tokens(text) == expected.split(), text


@pytest.mark.parametrize(("text", "expected"), DRAWN["different"])
def test_known_differences_from_the_toolkit(text: str, expected: str):
    assert english_tokens.tokens(text) != expected.split()  # the table of docs/benchmarks.md, "English captions"


def test_english_scores_are_the_toolkits():
    rows = ENGLISH["rows"]
    total, each = caption_metrics.score(
        [row["prediction"] for row in rows], [row["references"] for row in rows], language="en"
    )
    expected = {name: value for name, value in ENGLISH["expected"].items() if name != "meteor"}
    assert total == pytest.approx(expected, abs=1e-6)  # METEOR for English is left out
    for metric in ("rouge_l", "cider"):
        assert [values[metric] for values in each] == pytest.approx(ENGLISH["each"][metric], abs=1e-6), metric


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" .,;:! ? -- ' \" … — ", []),
        ("😀", []),
        ("?! (a) [b]", ["?!", "-lrb-", "a", "-rrb-", "-lsb-", "b", "-rsb-"]),
        ("a\nb\r\nc\u2028d", list("abcd")),  # line ends are spaces
        ("don’t", ["do", "n't"]),
        ("x" * 5000, ["x" * 5000]),
        ("no. 5 is no.", ["no.", "5", "is", "no"]),
        ("一只猫", ["一只猫"]),
    ],
)
def test_english_tokens(text: str, expected: list[str]):
    assert english_tokens.tokens(text) == expected


def test_english_captions_without_words_score_zero():
    total, each = caption_metrics.score(["", "...", "a cat"], [["a cat"], ["a dog"], ["A cat!"]], language="en")
    assert each[0]["cider"] == each[1]["rouge_l"] == 0 and each[2]["rouge_l"] == 1 and "meteor" not in total
    assert caption_metrics.score(["a cat"], [["a cat"]], language="en")[0]["bleu1"] == pytest.approx(1)
    for reference in ("...", "一只猫", "😀", "?!"):
        with pytest.raises(ValueError, match=r"item 0: the reference '.*' is not in the language 'en'"):
            caption_metrics.score(["a"], [[reference]], language="en")


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
