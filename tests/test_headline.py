"""The top of BENCHMARKS.md is drawn from BENCHMARKS.json, and its figures and commands are those of the sections."""

import json

import pytest

from benchmarks import headline

FIGURES = json.loads(headline.DATA.read_text(encoding="utf-8"))
PAGE = headline.PAGE.read_text(encoding="utf-8")


def test_page_and_chart_are_drawn_from_the_data():
    assert headline.page(PAGE, FIGURES) == PAGE
    assert headline.CHART.read_text(encoding="utf-8") == headline.draw(FIGURES)


def test_missed_goals_come_first():
    met = [line.count("**missed**") for line in headline.table(FIGURES).splitlines()[2:]]
    assert met == sorted(met, reverse=True) and sum(met) == sum(figure["met"] is False for figure in FIGURES)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure["what"])
def test_the_section_states_the_command(figure: dict):
    assert f"## {figure['section']}\n" in PAGE
    section = PAGE.partition(f"## {figure['section']}\n")[2].partition("\n## ")[0]
    assert figure["command"] in section
    if figure["ratio"] and figure["goal_ratio"]:
        assert figure["met"] == (figure["ratio"] >= figure["goal_ratio"])
