"""Normal form, exact match, containment and the most frequent answer."""

import pytest

from ymplug_jax.tasks.common import open_answers


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "contains"),
    [
        ("红色。", "红色", True, True),
        ("一个红色的圆形", "红色", False, True),
        ("红", "红色", False, False),
        ("ＲＥＤ  square!", "red square", True, True),
        ("12", "1", False, False),
        ("数字是12。", "12", False, True),
        ("3.5", "35", False, False),
        ("-5", "5", False, True),
        ("reddish", "red", False, False),
        ("a red one", "red", False, True),
        ("", "", False, False),
        ("", "红色", False, False),
        ("。", "。", True, True),
        ("a.b", "a.b", True, True),
        ("axb", "a.b", False, False),
    ],
)
def test_exact_and_contains(answer: str, reference: str, exact: bool, contains: bool) -> None:
    assert open_answers.exact(answer, [reference]) is exact
    assert open_answers.contains(answer, [reference]) is contains
    assert open_answers.exact(answer, ["没有", reference]) is exact and not open_answers.exact(answer, [])


def test_majority_counts_questions_and_ties_keep_the_first() -> None:
    assert open_answers.majority([["红"], ["蓝。"], ["蓝"]]) == ("蓝。", 2 / 3)
    assert open_answers.majority([["红"], ["蓝"]]) == ("红", 0.5)
    assert open_answers.majority([["红", "红。"], ["蓝"], ["蓝", "绿"]]) == (
        "蓝",
        2 / 3,
    )  # repeats of one question count once
    assert open_answers.majority([]) == ("", 0.0)
    assert open_answers.distinct(["红", "蓝", "红。", "绿"]) == ["红", "蓝", "绿"]
    assert open_answers.mean([]) is None and open_answers.mean([None, True, False]) == 0.5
