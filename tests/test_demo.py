"""Steps of the demo, and the errors that its report counts in generated titles."""

import re
from pathlib import Path

import pytest

from ymplug_jax.demo import LLMS, steps, wrong_parts


def test_wrong_parts_of_titles_are_counted() -> None:
    pairs = [
        ("红色的圆形在向上移动", "红色的圆形在向上移动"),
        ("红色的圆形在向上移动", "红色的圆形在向下移动"),
        ("白色的圆环在慢慢变小", "黑色的正方形在慢慢变小"),
        ("蓝色的正方形在慢慢变大", "蓝色的正方形"),  # no "在": neither the end of a shape nor a motion
        ("蓝色的正方形在慢慢变大", ""),
    ]
    rows = [{"title": title, "generated": generated} for title, generated in pairs]
    assert wrong_parts(rows) == {"colour": 2, "shape": 3, "motion": 3}
    assert wrong_parts([]) == {"colour": 0, "shape": 0, "motion": 0}


@pytest.mark.parametrize("llm", LLMS)
def test_every_training_step_uses_the_given_language_model(llm: str, tmp_path: Path) -> None:
    runs = [step.command for step in steps(tmp_path, 8, llm) if step.command[0] == "ymplug_jax.main"]
    assert len(runs) == 10
    assert {re.search(r":(\w+)$", command[1])[1] for command in runs} == {llm}
