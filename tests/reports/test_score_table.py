"""Displayed scores and chance levels, compared with values counted by hand or simulated."""

import numpy as np
import pytest

from ymplug_jax.reports import classes, score_table
from ymplug_jax.tasks.common import chance, example_pages
from ymplug_jax.tasks.common import scores as score_lib


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (57.142857, "57.1"), (5.26, "5.26"), (0.012345, "0.0123"), (1234.5, "1234"), (100.0, "100"), (0.0, "0"), (-0.5, "-0.500"),
        (9.996, "10.0"), (99.96, "100"), (999.6, "1000"), (1.2e-9, "1.20e-09"), (None, "–"), (float("nan"), "–"), (float("inf"), "–"),
    ],
)  # fmt: skip
def test_three_digits(value: float | None, text: str):
    assert score_table.three_digits(value) == text


def test_shares_are_percent_and_losses_nats():
    scores = {
        "task": "x", "split": "test", "step": 5, "examples": 21, "both/head_top1": 47.619, "bleu4": 0.31416, "cider": 1.0,
        "exact_share": 0.5, "token_accuracy": 0.75, "caption_loss": 2.5, "t2v_r5": 62.5, "t2v_median_rank": 3.0, "labelled": 21,
        "match/v2t_r1": None, "loss": float("nan"), "r_mean": 50.0,
    }  # fmt: skip
    known = (
        *score_lib.votes(("both",), ("head",)), *score_lib.captions(), *score_lib.shares("exact_share", "token_accuracy"),
        *score_lib.losses("caption_loss", "loss"), *score_lib.recalls("", "match"),
    )  # fmt: skip
    lines = score_table.table(scores, known, {"t2v_r5": 25.0, "token_accuracy": 0.001})
    assert [(line.group, line.name, line.text, line.chance_text) for line in lines] == [
        ("both", "head top-1", "47.6 %", ""),
        ("", "BLEU-4", "31.4 %", ""),
        ("", "CIDEr", "1.00", ""),
        ("", "exact share", "50.0 %", ""),
        ("", "token accuracy", "75.0 %", "0.100 %"),
        ("", "caption loss", "2.50 nats", ""),
        ("", "loss", "–", ""),
        ("", "mean of the recalls", "50.0 %", ""),
        ("text to video", "R@5", "62.5 %", "25.0 %"),
        ("text to video", "median rank", "3.00", ""),
        ("match, video to text", "R@1", "–", ""),
    ]
    printed = score_table.text(lines).split("\n")
    assert len(printed) == 11 and printed[0] == "both: head top-1               47.6 %"
    assert [line.higher_is_better for line in lines[:6]] == [True, True, True, True, True, False]
    assert score_table.text([]) == "" and score_table.columns_of("圆a") == 3


def test_chance_of_classes_counts_unlisted_labels_as_missed():
    rows = [{"label": label, "predicted": "a"} for label in ("a", "a", "b", "c", "unheard of", None)]
    scores = {
        "classes": 10,
        "labelled": 5,
        "unlisted": 1,
        "both/head_top1": 40.0,
        "both/head_top5": 80.0,
        "accuracy": 0.5,
    }
    found = chance.classes(scores, rows)
    assert found.scores == pytest.approx({"both/head_top1": 8.0, "both/head_top5": 40.0, "accuracy": 0.1})
    assert "top-1 40 % (2 of 5)" in found.notes[1] and "among 10 class names" in found.notes[0]
    assert chance.classes({"classes": 10}, [{"label": None, "predicted": "a"}]).scores == {}
    three = chance.classes({"classes": 3, "x_top5": 1.0}, [{"label": "a", "predicted": "a"}])
    assert three.scores == {"x_top5": 100.0}


def test_chance_of_recalls_with_several_right_texts():
    """Compared with 4,000 random orders of 5 clips with 1, 1, 2, 3 and 4 texts."""
    ids = [name for name, count in zip("abcde", (1, 1, 2, 3, 4), strict=True) for _ in range(count)]
    keys = [f"{side}_r{k}" for side in ("v2t", "t2v") for k in (1, 5, 10)] + [
        "v2t_mean_rank",
        "t2v_mean_rank",
        "r_mean",
    ]
    found = chance.retrieval(dict.fromkeys(keys, 0.0), [{"id": name, "t2v_rank": 1} for name in ids]).scores
    rng, texts = np.random.default_rng(0), np.array(ids)
    orders = [rng.permutation(texts) for _ in range(4000)]
    first = {name: np.array([1 + int(np.argmax(order == name)) for order in orders]) for name in "abcde"}
    for k in (1, 5, 10):
        assert found[f"v2t_r{k}"] == pytest.approx(
            100 * np.mean([(first[name] <= k).mean() for name in "abcde"]), abs=1.0
        )
        assert found[f"t2v_r{k}"] == pytest.approx(min(100, 20 * k))
    assert found["v2t_mean_rank"] == pytest.approx(np.mean([first[name].mean() for name in "abcde"]), rel=0.03)
    assert found["t2v_mean_rank"] == 3.0
    assert found["v2t_r1"] == pytest.approx(100 * (1 + 1 + 2 + 3 + 4) / 11 / 5)
    assert found["r_mean"] == pytest.approx(
        np.mean([found[f"{side}_r{k}"] for side in ("v2t", "t2v") for k in (1, 5, 10)])
    )


def test_chance_of_titles_and_tokens():
    rows = [{"title": title, "generated": ""} for title in ("x", "x", "x", "y")]
    scores = {"exact_share": 0.0, "token_accuracy": 0.1}
    found = chance.both(chance.titles(scores, rows), chance.tokens(scores, 512, "token_accuracy"))
    assert found.scores == {"exact_share": 0.75, "token_accuracy": 1 / 512} and "3 of 4" in found.notes[0]
    assert chance.titles({}, []).scores == chance.tokens({}, 512, "token_accuracy").scores == {}


def test_an_unknown_score_keeps_its_own_name() -> None:
    (known, other) = score_table.table({"other": 0.5, "loss": 1.0, "step": 3, "note": None}, score_lib.losses("loss"))
    assert (known.name, known.text, known.higher_is_better) == ("loss", "1.00 nats", False)
    assert (other.name, other.text, other.higher_is_better) == ("other", "0.500", None)


ROWS = [
    {"label": label, "predicted": a, "both/likelihood": a, "both/head": b}
    for label, a, b in (
        ("猫", "猫", "猫"),
        ("猫", "狗", "猫"),
        ("狗", "狗", "车"),
        ("船", "狗", "船"),
        (None, "猫", "猫"),
    )
]


def test_precision_and_recall_of_both_votes():
    lines = classes.table(ROWS, ["both/likelihood", "both/head"])
    by_name = {line.name: (line.count, line.share, line.by) for line in lines}
    assert by_name == {
        "猫": (2, 0.5, [(1, 1.0, 0.5), (2, 1.0, 1.0)]),
        "狗": (1, 0.25, [(3, pytest.approx(1 / 3), 1.0), (0, None, 0.0)]),
        "船": (1, 0.25, [(0, None, 0.0), (1, 1.0, 1.0)]),
        "车": (0, 0.0, [(0, None, None), (1, 0.0, None)]),
    }
    assert [line.name for line in lines] == ["猫", "狗", "船", "车"]
    assert example_pages.classes(("both",), ("likelihood", "head")).votes == {
        "both/likelihood": "by likelihood of the class name",
        "both/head": "by the head",
    }


def test_confusion_of_both_votes():
    likelihood = classes.matrix(ROWS, "both/likelihood", "")
    assert (likelihood.names, likelihood.answers, likelihood.right, likelihood.labelled) == (["猫", "狗", "船"], ["猫", "狗", "船"], 2, 4)  # fmt: skip
    assert [[n for n, _ in cells] for _, cells in likelihood.cells] == [[1, 1, 0], [0, 1, 0], [0, 1, 0]]
    head = classes.matrix(ROWS, "both/head", "")
    assert head.answers == ["猫", "狗", "船", "车"] and head.right == 3
    assert classes.matrix([{"label": None, "both/head": "猫"}], "both/head", "") is None
    many = [{"label": str(i), "x": str(i + 500)} for i in range(200)]
    big = classes.matrix(many, "x", "")
    assert len(big.names) == 45 and len(big.answers) == 90 and big.left_out == 310 and big.labelled == 200
