"""Answers, options and controls of the chat model's evaluation: arrays, scores and the page."""

import json

import numpy as np
import pytest
from etils import epath

from conversations import Held, clip, record, record_of
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import conversation
from ymplug_jax.models.bloom import Bloom
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.reports import evaluation_report
from ymplug_jax.tasks.mplug_chat import answer_page, answer_scores, answering
from ymplug_jax.tasks.mplug_chat.questions import Questions
from ymplug_jax.training import evaluation_files

SLOTS, NEW, K, W = 3, 8, 4, 6


class Characters:
    """A tokenizer whose tokens are characters."""

    vocab_size, bos, eos, pad = 70000, 1, 2, 3

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids) -> str:
        return "".join(chr(i) for i in ids if i > 3)

    def begins(self) -> str:
        return "1"


KNOWN = Characters()


def place(ids: np.ndarray) -> np.ndarray:
    return np.where(ids < 0, np.cumsum(ids < 0) - 1, -1)


def said(text: str) -> np.ndarray:
    ids = [*KNOWN.encode(text), KNOWN.eos][:NEW]
    return np.array(ids + [KNOWN.eos] * (NEW - len(ids)), np.int32)


def row(
    index: int, answers: dict[str, str], votes: dict[str, list[float]] | None = None, asked: bool = True, tokens=None
):
    """Predictions of one example: answers and log-probabilities of the options by control."""
    made = {"index": np.int64(index)}
    for name, text in answers.items():
        end = f"/{name}" if name else ""
        made |= {f"generated{end}": said(text), f"asked{end}": np.array(asked)}
        own = (votes or {}).get(name, [])
        made[f"likelihood{end}"] = np.array(own + [0.0] * (K - len(own)), np.float32)
        made[f"tokens{end}"] = np.array((tokens or [2] * len(own)) + [0] * (K - len(own)), np.int32)
    return made


def same(text: str, black: str, other: str) -> dict[str, str]:
    return {"": text, "black": black, "other": other}


def test_the_prompt_stands_at_the_right_end_and_ends_before_the_answer() -> None:
    one = record([clip(0)], "什么？", "猫")
    made = answering.prompt_of(one, KNOWN, SLOTS, 64, place)
    text = one.text[: -len("猫")]
    ids = conversation.for_answering(text, KNOWN, SLOTS)
    start = 64 - len(ids)
    assert made["asked"] and list(made["prompt_mask"]) == [False] * start + [True] * len(ids)
    assert list(made["prompt_ids"][start:]) == np.maximum(ids, 0).tolist() and set(made["prompt_ids"][:start]) == {3}
    assert list(made["prompt_index"][made["prompt_index"] >= 0]) == [0, 1, 2]
    for other in (record_of([clip(0)], "Human: a"), one._replace(text="Human: " + "长" * 80 + "\nAI: 猫")):
        rest = answering.prompt_of(other, KNOWN, SLOTS, 64, place)
        assert not rest["asked"] and rest["prompt_mask"].sum() == 1 and rest["prompt_ids"][-1] == KNOWN.bos
    exact = answering.prompt_of(one, KNOWN, SLOTS, len(ids), place)
    assert exact["asked"] and exact["prompt_mask"].all()


def test_options_are_answers_with_their_end_token_or_are_refused() -> None:
    made = answering.options_of(record([], "q", "红", options=["红", "蓝色"]), KNOWN, K, W)
    assert made["branches"][1].tolist() == [ord("蓝"), ord("色"), 2, 3, 3, 3]
    assert made["targets"].sum(axis=1).tolist() == [2, 3, 0, 0]
    with pytest.raises(Mistake, match=r"^rows.jsonl:1: 2 options, but config.options.choices is 1; raise it to 2$"):
        answering.options_of(record([], "q", "红", options=["红", "蓝"]), KNOWN, 1, W)
    with pytest.raises(Mistake, match=r"option '一二三四五六' has 7 tokens with its end token.*raise it to 7$"):
        answering.options_of(record([], "q", "红", options=["红", "一二三四五六"]), KNOWN, K, W)
    views = answering.views(Held([record([], "q", "红"), record([], "q", "一二三四五六")]), KNOWN, K, W)
    assert views[""][0].options == ()  # an answer of this kind is too long to be an option


def test_answers_must_fit_after_the_longest_prompt() -> None:
    lm = GPT3(vocab=64, width=32, depth=2, heads=2, max_positions=32)
    answering.check_room(lm, 24, 8, 8)
    answering.check_room(Bloom(vocab=40, width=16, depth=2, heads=2), 5000, 8, 8)
    with pytest.raises(
        Mistake, match=r"^config.options.new_tokens: 9 after a prompt of config.data.max_tokens 24 exceeds"
    ):
        answering.check_room(lm, 24, 9, 8)
    with pytest.raises(Mistake, match=r"^config.options.choice_tokens: 9 after"):
        answering.check_room(lm, 24, 8, 9)


def split() -> tuple[Questions, list[dict]]:
    """Six records: four questions with media (one asked by two records), one text-only, one without an answer."""
    rows = Held([
        record([clip(0)], "颜色", "红色"),
        record([clip(1)], "颜色", "蓝色"),
        record([clip(1)], "颜色", "深蓝。"),  # the same question, another right answer
        record([clip(2)], "颜色", "红色"),
        record([clip(3)], "几个", "3", "number_sft", ["2", "3"]),
        record([], "你好", "你好！", "chat_sft"),
        record_of([clip(4)], "Human: a"),
    ])  # fmt: skip
    held = Questions(rows, K)
    predictions = [
        row(0, same("红色。", "红色", "蓝色"), {"": [-3, -2, -1], "black": [-3, -2, -1], "other": [-1, -2, -3]}),
        row(1, same("是深蓝", "红色", "红色"), {"": [-1, -3, -3], "black": [-2, -1, -2], "other": [-2, -2, -1]}),
        row(2, same("别的", "", "")),  # not counted: the first record answers for the question
        row(3, same("黄色", "红色", "红色"), {"": [-1, -1, -1], "black": [-1, -1, -1], "other": [-1, -1, -1]}),
        row(4, same("3", "2", "13"), {"": [-4, -3], "black": [-1, -2], "other": [-1.5, -2]}, tokens=[1, 2]),
        row(5, same("你好", "不", "不")),
        row(6, same("", "", ""), asked=False),
    ]
    return held, predictions


def test_scores_overall_by_kind_and_under_the_controls() -> None:
    held, rows = split()
    assert held[0].options == ("深蓝。", "红色", "蓝色")  # sorted
    report = answering.report(rows, held, KNOWN)
    scores, answers = report.scores, {one["index"]: one for one in report.rows}
    assert list(answers) == [0, 1, 3, 4, 5] and answers[1]["references"] == ["蓝色", "深蓝。"]
    assert (scores["questions"], scores["text_only"], scores["without_answer"]) == (5, 1, 1)
    assert scores["exact"] == 3 / 5 and scores["exact/media"] == 2 / 4  # red, 3 and the greeting
    assert scores["contains"] == 4 / 5 and answers[1]["contains"] and not answers[1]["exact"]
    assert scores["exact/black"] == 2 / 4 and scores["exact/other"] == 1 / 4
    assert scores["contains/other"] == 1 / 4  # 13 does not contain 3
    assert scores["exact/majority"] == (2 + 1) / 4  # red is right twice among three colours, and 3 among one number
    colour, number, chat = (scores["kinds"][kind] for kind in ("colour", "number", "chat"))
    assert colour["questions"] == 3 and colour["exact/black"] == 2 / 3 and colour["exact/majority"] == 2 / 3
    assert number["exact"] == 1 and number["exact/black"] == 0 and number["choice/uniform"] == 0.5
    assert chat == {"questions": 1, "exact": 1.0, "contains": 1.0}  # no media: no controls
    # Options: row 0 prefers blue; row 1 dark blue; row 3 ties; row 4 by mean -4 < -1.5, by sum -4 < -3.
    assert [answers[i]["choice"] for i in (0, 1, 3, 4)] == [False, True, False, True]
    assert answers[3]["chosen"] != "红色" and answers[4]["chosen"] == "3"
    assert (
        answers[4]["chosen/black"] == "2" and not answers[4]["choice/black"]
    )  # -1 / 1 against -2 / 2: a tie counts as wrong
    assert (
        answers[4]["choice/other"] and not answers[4]["choice_total/other"]
    )  # -1.5 / 1 against -2 / 2, but -1.5 against -2
    assert "choice" not in answers[5] and "answer/black" not in answers[5]
    assert scores["cider"] > 0 and "cider/black" in scores and "bleu4/other" in scores
    evaluation_files.check({"split": "validation"} | scores, report, held)
    known = {score.name for score in answer_scores.known()}
    floats = {name for name, value in scores.items() if isinstance(value, float)}
    assert floats <= known, floats - known
    better = {score.name: score.higher_is_better for score in answer_scores.known()}
    assert better["exact"] and better["cider/media"] and better["exact/black"] is better["cider/other"] is None


def test_nothing_to_score_is_no_error(tmp_path) -> None:
    held = Questions(Held([record_of([], "Human: a"), record_of([clip(0)], "Human: b")]), K)
    report = answering.report([row(0, same("x", "", "")), row(1, same("x", "", ""))], held, KNOWN)
    assert report.rows == [] and report.scores["questions"] == 0 and report.scores["kinds"] == {}
    assert "nothing is scored" in report.scores["note"] and not [
        v for v in report.scores.values() if isinstance(v, float)
    ]
    evaluation_report.write(
        epath.Path(tmp_path) / "a.html", report.scores, [], None, known=answer_scores.known(), page=answer_page.page()
    )
    assert answering.report([], held, KNOWN).scores["questions"] == 0


def test_long_prompts_and_missing_other_clips_are_counted() -> None:
    held = Questions(Held([record([clip(0)], "q", "a"), record([clip(0)], "r", "b"), record([], "s", "c")]), K)
    rows = [row(0, same("a", "a", "a")), row(1, same("b", "b", "b")), row(2, same("c", "c", "c"), asked=False)]
    scores = answering.report(rows, held, KNOWN).scores
    assert (scores["too_long"], scores["questions"], scores["exact/black"]) == (1, 2, 1) and "exact/other" not in scores
    assert scores["note"] == (
        "2 questions have no other clip to be asked about and no control with one; no right answer has a Chinese character: "
        "caption metrics are left out"
    )


def test_a_likelihood_that_is_not_finite_names_its_example() -> None:
    held, rows = split()
    rows[3]["likelihood/other"][1] = np.nan
    with pytest.raises(
        Mistake, match=r"^videos/2.mp4 \(example 3 of the split\): the model's 'likelihood/other' is nan"
    ):
        answering.report(rows, held, KNOWN)


def test_the_page_shows_the_answers_side_by_side_and_the_table_of_kinds(tmp_path) -> None:
    held, rows = split()
    report = answering.report(rows, held, KNOWN)
    path = epath.Path(tmp_path) / "report.html"
    facts = {"task": "mplug_chat_instruct", "split": "validation", "step": 1, "examples": 7} | report.scores
    page = answer_page.page()
    evaluation_report.write(path, facts, report.rows, held, known=answer_scores.known(), page=page)
    html = path.read_text(encoding="utf-8")
    card = html[html.index("Not exact") :]
    card = card[: card.index("options ")]
    assert [card.count(word) for word in ("true media", "black frames", "another clip")] == [1, 1, 1]
    assert (
        "是深蓝" in card and card.count("data:image/jpeg") == 2 + 2
    )  # the frames of the clip, and one of each run but black
    exact, contains, choice = page.breakdowns(report.scores)
    assert exact.columns == (
        "kind",
        "questions",
        "all",
        "with media",
        "black frames",
        "another clip",
        "most frequent answer",
    )
    assert [cell[0] for cell in exact.rows[1]] == ["chat", "1", "100.0 %", "–", "–", "–", "–"]
    assert [cell[0] for cell in exact.rows[0]] == ["all", "5", "60.0 %", "50.0 %", "50.0 %", "25.0 %", "75.0 %"]
    assert contains.rows[0][-1][0] == "75.0 %" and [row[0][0] for row in choice.rows] == ["all", "colour", "number"]
    assert (
        "Exact answers by kind of question" in html
        and "5 questions, 1 of them without media" in html
        and "uniform guess" in html
    )
    summary = evaluation_report.summary(facts, report.rows, known=answer_scores.known(), page=page)
    assert "questions with media: exact  " in summary and "chance 75.0 %" in summary
    json.dumps(report.rows)


def test_a_model_without_eyes_scores_the_same_under_the_controls() -> None:
    """A toy that always says the most frequent answer of a kind has exactly the majority's score with and without media."""
    rng = np.random.default_rng(0)
    answers = {"colour_sft": ["红色", "红色", "蓝色"], "number_sft": ["1", "2", "2", "3"]}
    kinds = [("colour_sft", "number_sft")[i % 2] for i in range(40)]
    rows = Held([record([clip(i)], "q", rng.choice(answers[kind]), kind) for i, kind in enumerate(kinds)])
    held = Questions(rows, K)
    told = {kind: max(set(texts), key=texts.count) for kind, texts in answers.items()}
    scores = answering.report([row(i, same(*[told[kinds[i]]] * 3)) for i in range(40)], held, KNOWN).scores
    assert scores["exact/media"] == scores["exact/black"] == scores["exact/other"] == scores["exact/majority"]
    seeing = [
        row(i, {"": rows[i].text.rpartition("AI: ")[2], "black": told[kinds[i]], "other": "?"}) for i in range(40)
    ]
    better = answering.report(seeing, held, KNOWN).scores
    assert better["exact/media"] == 1 and better["exact/black"] == scores["exact/black"] and better["exact/other"] == 0
