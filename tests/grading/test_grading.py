"""Question sets, blind sheets, and grades of synthetic graders of known bias and noise."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from ymplug_jax.core.exits import Mistake
from ymplug_jax.grading import grades, question_sets, results, sheets
from ymplug_jax.grading.grades import VALUES, Grades
from ymplug_jax.grading.question_sets import Question
from ymplug_jax.grading.sheets import Key

LETTERS = {value: grade for grade, value in VALUES.items()}
QUESTIONS = [Question(str(i), f"v{i // 2}.mp4", f"问题{i}？", ("scene", "detail", "text")[i % 3]) for i in range(60)]


def key_of(seed: str = "s", questions: list[Question] = QUESTIONS) -> Key:
    """Two systems with different answers, and one that answers as the first to every fifth question."""
    first = [f"甲{one.id}" for one in questions]
    second = [f"乙{one.id}" for one in questions]
    third = [first[i] if i % 5 == 0 else f"丙{one.id}" for i, one in enumerate(questions)]
    return sheets.blind(questions, {"first": first, "second": second, "third": third}, seed)


def exported(folder: Path, key: Key, name: str, values: np.ndarray, **changes) -> Path:
    """The file that a grader exports."""
    marks = {answer: LETTERS[float(value)] for answer, value in zip(key.names, values, strict=True)}
    facts = {"sheet": key.sheet, "grader": name, "grades": marks} | changes
    file = folder / f"{name}.json"
    file.write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")
    return file


def qualities(key: Key, quality: dict[str, float], seed: int = 0) -> np.ndarray:
    """True quality of every answer, f64[N]: that of its system, of its video and its own."""
    rng = np.random.default_rng(seed)
    of_video = {one.video: rng.normal(0, 0.3) for one in key.questions}
    return np.array([
        quality[entry.systems[0]] + of_video[question.video] + rng.normal(0, 0.4)
        for question, own in zip(key.questions, key.entries, strict=True) for entry in own
    ])  # fmt: skip


def synthetic(true: np.ndarray, bias: list[float], noise: float) -> np.ndarray:
    """Grades of graders with a bias each and noise of their own, f64[G, N]."""
    each = true + np.array(bias)[:, None] + np.random.default_rng(1).normal(0, noise, (len(bias), len(true)))
    return np.clip(np.round(each), 0, 3)


def write(path: Path, rows: list) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_question_sets_and_answers(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", [
        {"id": 7, "video": "a.mp4", "question": " 谁？ ", "category": "scene"}, "", {"video": "b/c.mp4", "question": "谁？"},
    ])  # fmt: skip
    questions = question_sets.read_questions(file)
    assert questions == [Question("7", "a.mp4", "谁？", "scene"), Question("3", "b/c.mp4", "谁？", "all")]
    rows = [{"video": "b/c.mp4", "question": "谁？", "answer": " 没\n有 "}, {"id": "7", "answer": ""}]
    assert question_sets.read_answers(write(tmp_path / "a.jsonl", rows), questions) == ["", "没 有"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "q.jsonl: no questions in it; write one JSON object per line"),
        (['{"video": "a"'], "q.jsonl, line 1: not JSON"),
        (["[1]"], "q.jsonl, line 1: not a JSON object"),
        ([{"video": "a.mp4"}], 'q.jsonl, line 1: no text under "question"; add it'),
        ([{"video": "../a.mp4", "question": "q"}], "q.jsonl, line 1: '../a.mp4' is not a path below the video root"),
        ([{"video": "/a.mp4", "question": "q"}], "q.jsonl, line 1: '/a.mp4' is not a path below the video root"),
        ([{"id": 1, "video": "a", "question": "q"}] * 2, "q.jsonl, line 2: the id '1' repeats"),
        (['{"id": 1, "id": 2, "video": "a", "question": "q"}'], "q.jsonl, line 1: the name 'id' repeats in one object"),
    ],
)
def test_question_sets_that_are_refused(rows: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=re.escape(message)):
        question_sets.read_questions(write(tmp_path / "q.jsonl", rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "0", "answer": "a"}], "a.jsonl: 1 questions have no answer, the first is '1'; add them"),
        ([{"id": "0", "answer": "a"}] * 2, "a.jsonl, line 2: a second answer to question '0'"),
        ([{"id": "2", "answer": "a"}], "a.jsonl, line 1: no such question in the question set"),
        ([{"video": "v0.mp4", "question": "？", "answer": "a"}], "a.jsonl, line 1: no such question"),
        ([{"id": "0", "answer": None}], 'a.jsonl, line 1: no text under "answer"'),
    ],
)
def test_answers_that_are_refused(rows: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(Mistake, match=re.escape(message)):
        question_sets.read_answers(write(tmp_path / "a.jsonl", rows), QUESTIONS[:2])
    with pytest.raises(Mistake, match=r"none.jsonl: no such file"):
        question_sets.read_answers(tmp_path / "none.jsonl", QUESTIONS)


def test_the_page_is_the_same_whichever_system_gave_which_answer() -> None:
    """So nothing in it can tell the systems apart; the seed alone decides about the order."""
    answers = {"alpha": [f"甲{i}" for i in range(60)], "beta": [f"乙{i}" for i in range(60)]}
    frames = {one.video: ["data:image/jpeg;base64,AAAA"] for one in QUESTIONS}
    key = sheets.blind(QUESTIONS, answers, "seed-17")
    swapped = sheets.blind(QUESTIONS, {"alpha": answers["beta"], "beta": answers["alpha"]}, "seed-17")
    page = sheets.page(key, frames)
    assert page == sheets.page(swapped, frames) and key.sheet == swapped.sheet
    assert not [word for word in ("alpha", "beta", "seed-17") if word in page]
    first = [own[0].systems[0] for own in key.entries]
    assert 20 <= first.count("alpha") <= 40  # neither system always comes first
    assert [own[0].systems[0] for own in sheets.blind(QUESTIONS, answers, "other").entries] != first
    assert sheets.blind(QUESTIONS, answers, "seed-17") == key and sheets.new_seed() != sheets.new_seed()
    assert page.count("data:image/jpeg") == 30 and 'src="http' not in page and "<script>" in page


def test_equal_answers_are_graded_once_and_text_cannot_become_markup() -> None:
    questions = [Question("<q>", "v.mp4", "<b>谁</b>？", "a&b")]
    key = sheets.blind(questions, {"a": ["<script>1</script>"], "b": ["<script>1</script>"], "c": [""]}, "s")
    assert sorted(entry.systems for entry in key.entries[0]) == [("a", "b"), ("c",)] and len(key.names) == 2
    page = sheets.page(key, {"v.mp4": []})
    assert "<script>1" not in page and "<b>谁" not in page and "(empty answer)" in page
    with pytest.raises(Mistake, match=r"^--system: only one system"):
        sheets.blind(questions, {"a": ["x"]}, "s")


def test_the_key_comes_back_and_damage_is_refused(tmp_path: Path) -> None:
    key, file = key_of(), tmp_path / "sheet.key.json"
    file.write_text(sheets.as_json(key), encoding="utf-8")
    assert sheets.read_key(file) == key
    text = file.read_text(encoding="utf-8")
    for broken, message in (
        (text.replace("甲7", "甲8", 1), "damaged, its answers are not those of sheet"),
        (text.replace('"systems"', '"system"'), "damaged; make sheet and key again"),
        (text.replace(sheets.FORMAT, "x"), "not a key of a grading sheet"),
        (text[:100], "not JSON"),
    ):
        file.write_text(broken, encoding="utf-8")
        with pytest.raises(Mistake, match=f"^{re.escape(str(file))}.*{message}"):
            sheets.read_key(file)


def test_grades_are_read_and_damaged_missing_or_double_ones_are_refused(tmp_path: Path) -> None:
    key = key_of()
    values = synthetic(qualities(key, {"first": 2, "second": 1, "third": 1}), [0, 0, 0], 0.3)
    files = [exported(tmp_path, key, name, row) for name, row in zip(("王", "Li", "Zhao"), values, strict=True)]
    found = grades.read(files, key)
    assert found.graders == ("王", "Li", "Zhao") and np.array_equal(found.values, values)

    def refused(message: str, **changes) -> None:
        bad = exported(tmp_path, key, "bad", values[0], **changes)
        with pytest.raises(Mistake, match=message):
            grades.read([*files[:2], bad], key)

    marks = {name: "A" for name in key.names}
    refused(r"bad.json: 1 answers have no grade, the first is 0/1; grade them", grades={k: "A" for k in key.names[1:]})
    refused(r"bad.json: 'E' of answer 0/1 is no grade; use A, B, C, D", grades=marks | {"0/1": "E"})
    refused(r"bad.json: 1 of answer 0/1 is no grade", grades=marks | {"0/1": 1})
    refused(r"bad.json: the sheet has no answer '0/9'", grades=marks | {"0/9": "A"})
    refused(r"bad.json: grades of sheet 0123, but the key is of sheet", sheet="0123")
    refused(r"bad.json: no grader or no grades in it", grader=" ")
    refused(r"bad.json: no grader or no grades in it", grades=[])
    refused(r"bad.json: grader 'li' is the one of .*Li.json; give one file for each", grader=" li")
    twice = tmp_path / "twice.json"
    twice.write_text(files[0].read_text().replace('"0/1":', '"0/1": "A", "0/1":'))
    with pytest.raises(Mistake, match=r"twice.json: the name '0/1' repeats in one object"):
        grades.read([*files[1:], twice], key)
    with pytest.raises(Mistake, match=r"^--grades: 2 files, but agreement needs 3 graders or more"):
        grades.read(files[:2], key)
    with pytest.raises(Mistake, match=r"none.json: no such file"):
        grades.read([*files[:2], tmp_path / "none.json"], key)


def test_synthetic_graders_of_known_bias_are_recovered() -> None:
    key, bias = key_of(), [0.5, 0.0, -0.5]
    true = qualities(key, {"first": 2.0, "second": 1.2, "third": 1.2})
    found = results.aggregate(key, Grades(("high", "even", "low"), synthetic(true, bias, 0.3)), samples=2000, seed=0)
    owners = [entry.systems for own in key.entries for entry in own]
    wanted = {name: true[[name in systems for systems in owners]].mean() for name in key.systems}
    for name, own in found["systems"].items():
        assert own["mean"] == pytest.approx(wanted[name], abs=0.08)
        assert own["interval"][0] < wanted[name] < own["interval"][1]
    pair = {tuple(one["systems"]): one for one in found["pairs"]}
    apart = pair["first", "second"]
    assert apart["difference"] == pytest.approx(wanted["first"] - wanted["second"], abs=0.08)
    assert 0 < apart["interval"][0] < wanted["first"] - wanted["second"] < apart["interval"][1]
    third = pair["first", "third"]
    assert (
        third["difference"] == pytest.approx(wanted["first"] - wanted["third"], abs=0.08) and third["equal"] >= 12
    )  # a fifth is the same answer
    none = pair["second", "third"]
    assert none["interval"][0] < none["difference"] < none["interval"][1]
    above = {name: own["above_others"] for name, own in found["graders"].items()}
    assert above == {
        "high": pytest.approx(0.75, abs=0.12),
        "even": pytest.approx(0, abs=0.12),
        "low": pytest.approx(-0.75, abs=0.12),
    }
    assert sum(found["systems"]["first"]["grades"].values()) == 180
    assert set(found["categories"]) == {"scene", "detail", "text"} and found["categories"]["scene"]["questions"] == 20
    text = results.text(found)
    assert "first - second: +" in text and "ordinal alpha" in text and "high: mean" in text
    json.dumps(found, allow_nan=False)


def test_paired_intervals_use_the_pairing_and_hold_their_level() -> None:
    """Videos differ much, systems by a constant: the paired interval is narrow, and about 95 % of intervals hold the truth."""
    inside, widths = 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        difficulty = rng.normal(0, 1, 30)
        scores = np.stack([difficulty, difficulty + 0.5 + rng.normal(0, 0.2, 30)], axis=1)
        draws = results._draws(30, 400, seed)
        low, high = results._interval(scores[:, 1] - scores[:, 0], np.arange(30), draws)
        single = results._interval(scores[:, 1], np.arange(30), draws)
        inside += low < 0.5 < high
        widths.append((high - low) / (single[1] - single[0]))
    assert 50 <= inside <= 60 and np.mean(widths) < 0.4


def test_agreement() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 200).astype(float)
    assert results.agreement(np.stack([true] * 3))["alpha"] == 1
    assert abs(results.agreement(rng.integers(0, 4, (3, 200)).astype(float))["alpha"]) < 0.1
    near = np.stack([true, np.clip(true + 1, 0, 3), true])  # a bias of one grade disagrees less than chance
    far = np.stack([true, 3 - true, true])
    assert 1 > results.agreement(near)["alpha"] > 0.5 > results.agreement(far)["alpha"]
    same = results.agreement(np.full((3, 5), 2.0))
    assert same["alpha"] is None and same["all_alike"] == 1 and "not defined" in same["note"]
    # The published example with four observers and ordinal alpha 0.815, without missing values, as the library computes it.
    assert results.agreement(near)["alpha"] == pytest.approx(float(_ordinal_alpha(near)), abs=1e-9)


def _ordinal_alpha(values: np.ndarray) -> float:
    """Krippendorff's alpha from its definition: observed over expected squared ordinal distances of pairs."""
    graders, units = values.shape
    totals = np.array([np.sum(values == grade) for grade in range(4)], float)

    def apart(a: int, b: int) -> float:
        low, high = min(a, b), max(a, b)
        return (totals[low : high + 1].sum() - (totals[low] + totals[high]) / 2) ** 2

    table = np.array([[apart(a, b) for b in range(4)] for a in range(4)])
    observed = sum(
        table[int(values[i, u]), int(values[j, u])] for u in range(units) for i in range(graders) for j in range(graders) if i != j
    ) / (graders - 1)  # fmt: skip
    n = totals.sum()
    expected = sum(totals[a] * totals[b] * table[a, b] for a in range(4) for b in range(4)) / (n - 1)
    return 1 - observed / expected


def test_one_video_has_no_interval() -> None:
    questions = [one._replace(video="v.mp4") for one in QUESTIONS[:4]]
    key = key_of(questions=questions)
    found = results.aggregate(key, Grades(("a", "b", "c"), np.full((3, len(key.names)), 3.0)), samples=100, seed=0)
    assert found["systems"]["first"]["interval"] is None and found["pairs"][0]["interval"] is None
    assert "no interval" in results.text(found) and found["agreement"]["alpha"] is None
