"""The HTML report is valid and self-contained for any rows, and its text and pictures match them."""

import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from etils import epath

import shards
from ymplug_jax.core import config
from ymplug_jax.reports import evaluation_report, examples
from ymplug_jax.tasks.common import chance, class_votes, example_pages, gallery, pair_ranking, scores
from ymplug_jax.tasks.mplug_video import caption, classify, match, pretrain, retrieve
from ymplug_jax.tasks.presentation import Page
from ymplug_jax.tasks.task import Report
from ymplug_jax.training import evaluation_files

CLASSES = example_pages.classes(class_votes.MODALITIES, ("likelihood", "head"))
CAPTIONS, RANKING, TITLES = (
    example_pages.captions(),
    example_pages.ranking("similarity", "text_similarity"),
    example_pages.titles(),
)
KNOWN = (*classify.SCORES, *caption.SCORES, *pretrain.SCORES, *retrieve.SCORES, *match.SCORES)
FACTS = {"task": "classify", "split": "validation", "step": 7, "examples": 3}
NASTY = "videos/很长的名字" * 30 + "/a b'\"<script>alert(1)</script>&amp;\u202e.mp4"


class Reader(HTMLParser):
    """HTML parser that collects text and tags and asserts that elements are nested correctly."""

    VOID = ("meta", "img", "input", "br")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        optional = ("li", "option", "td", "th", "tr", "p", "tbody")
        while self.open[-1] != tag and self.open[-1] in optional:
            self.open.pop()
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def records(count: int) -> list:
    return [SimpleNamespace(frames=[shards.jpeg(10 * i + t) for t in range(4)]) for i in range(count)]


def write(
    path: Path, scores: dict, rows: list[dict], held: list | None, page: Page = CLASSES, **more
) -> tuple[Reader, str]:
    facts = FACTS | {"examples": len(rows)} | scores
    evaluation_report.write(epath.Path(path), facts, rows, held, known=KNOWN, page=page, **more)
    html = path.read_text(encoding="utf-8")
    assert "http://" not in html and "https://" not in html and 'src="/' not in html
    return Reader(html), html


def classified(i: int, label: str | None, answer: str, head: str, **more) -> dict:
    row = {
        "index": i,
        "id": f"{i}.mp4",
        "title": f"第{i}个标题",
        "label": label,
        "both/likelihood": answer,
        "both/head": head,
    }
    return row | {"predicted": answer, "top5": {answer: 0.75, "别的": 0.25}} | more


def test_classes(tmp_path: Path):
    rows = [
        classified(0, "猫", "猫", "狗"),
        classified(1, "猫", "狗", "猫"),
        classified(2, "狗", "狗", "狗", id=NASTY, title=NASTY),
    ]
    found, html = write(tmp_path / "r.html", {"both/head_top1": 66.7, "classes": 45, "labelled": 3}, rows, records(3))
    assert "by likelihood of the class name: 2 of 3 right (66.7 %)" in found.text
    assert "by the head: 2 of 3 right (66.7 %)" in found.text
    assert "Wrong (1 of 1 shown)" in found.text and "Right (2 of 2 shown)" in found.text
    assert "head top-1 66.7 % 2.22 %" in found.text and "a uniform guess among 45" in found.text
    assert "2 of 2 classes shown" in found.text and "猫 2 66.7 % 1 100 % 50.0 % 1 100 % 50.0 %" in found.text
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)" in html
    assert html.count("data:image/jpeg;base64,") == 12
    cards = [attributes for tag, attributes in found.tags if attributes.get("class") == "card"]
    assert [(card["data-verdict"], card["data-place"], card["data-sort"]) for card in cards] == [
        ("wrong", "1", "0.75"), ("right", "0", "0.75"), ("right", "2", "0.75"),
    ]  # fmt: skip


def test_one_class_and_no_label(tmp_path: Path):
    found, _ = write(tmp_path / "one.html", {"classes": 45}, [classified(0, "猫", "猫", "猫")], records(1))
    assert "1 of 1 right (100 %)" in found.text and "1 of 1 classes shown" in found.text
    rows = [classified(i, None, "猫", "狗") for i in range(3)]
    found, html = write(
        tmp_path / "none.html", {"classes": 45, "labelled": 0, "note": "this split has no labels"}, rows, None
    )
    assert (
        "Confusion" not in found.text and "Without a label (3 of 3 shown)" in found.text and "no labels" in found.text
    )
    assert "true <b>" not in html and "predicted 猫" in found.text


def test_a_page_of_two_thousand_examples_is_small(tmp_path: Path):
    held = records(2000)
    rows = [classified(i, f"类{i % 60}", f"类{i % 50}", f"类{i % 70}", title="标题" * 40) for i in range(2000)]
    found, html = write(tmp_path / "r.html", {"classes": 100, "labelled": 2000}, rows, held)
    assert "12 of" in found.text and "All examples (1000 of 2000 shown; all are in predictions.jsonl)" in found.text
    assert "70 of 70 classes shown" in found.text and "rarer classes are not shown" in found.text
    assert len(html) < 2_000_000 and html.count("data:image/jpeg") == 24 * 4


def test_captions(tmp_path: Path):
    rows = [
        {"index": i, "id": f"{i}.mp4", "caption": f"说{i}", "references": [f"对{i}之{r}" for r in range(3 + 4 * (i == 39))], "cider": i / 10, "meteor": 0.5, "rouge_l": 0.25}
        for i in range(40)
    ]  # fmt: skip
    rows += [{"index": 40, "id": "x", "caption": "", "references": []}]
    rows += [{"index": 41, "caption": "破", "references": ["a"], "cider": float("nan"), "meteor": None}]
    found, _ = write(
        tmp_path / "r.html", {"bleu4": 0.123456, "cider": 1.5, "labelled": 40}, rows, records(42), CAPTIONS
    )
    assert "BLEU-4 12.3 %" in found.text and "CIDEr 1.50" in found.text
    assert "Worst by CIDEr (12 of 40 shown)" in found.text and "Best by CIDEr (12 of 40 shown)" in found.text
    assert (
        "Random sample of the rest (12 of 16 shown)" in found.text and "Without references (2 of 2 shown)" in found.text
    )
    assert "7 references, 5 of them shown" in found.text and "2 more" in found.text
    assert "125 references for 41 clips, 1 to 7 per clip" in found.text and "(empty)" in found.text
    places = [int(a["data-place"]) for tag, a in found.tags if a.get("class") == "card"]
    assert places[:12] == list(range(12)) and places[24:36] == list(range(39, 27, -1))
    assert sorted(set(places)) == sorted(places) and places == [
        int(a["data-place"]) for _, a in write(tmp_path / "again.html", {}, rows, records(42), CAPTIONS)[0].tags if a.get("class") == "card"
    ]  # fmt: skip


def test_three_captions_are_shown_once_each(tmp_path: Path):
    rows = [{"index": i, "id": "", "caption": "c", "references": ["r"], "cider": 1.0 * i} for i in range(3)]
    parts = {
        part.title: [card["index"] for card in part.cards] for part in examples.sections(CAPTIONS, rows, lambda *_: [])
    }
    assert parts == {"Worst by CIDEr": [0], "Random sample of the rest": [1], "Best by CIDEr": [2]}
    assert [len(p.cards) for p in examples.sections(CAPTIONS, rows[:1], lambda *_: [])] == [1]
    assert [len(p.cards) for p in examples.sections(CAPTIONS, rows[:2], lambda *_: [])] == [1, 1]


def ranked() -> tuple[list[dict], list]:
    """Rows and records of two clips, the second with two texts."""
    names, texts = ["a.mp4", "b.mp4", "b.mp4"], ["甲", "乙", "丙"]
    video = np.eye(4, dtype=np.float32)[[0, 1, 1]]
    text = np.array([[0.6, 0.8, 0, 0], [0, 1, 0, 0], [0.8, 0.6, 0, 0]], np.float32)
    held = [SimpleNamespace(media_id=n, captions=[t], title="", frames=[shards.jpeg(1)]) for n, t in zip(names, texts, strict=True)]  # fmt: skip
    return [{"index": np.int64(i), "video": video[i], "text": text[i]} for i in range(3)], held


def test_retrieval_shows_both_directions_with_similarities(tmp_path: Path):
    rows, held = ranked()
    report = gallery.rank_all(rows, held)
    first = report.rows[0]
    assert (first["t2v_rank"], first["retrieved"], first["similarity"]) == (2, ["b.mp4", "a.mp4"], [0.8, 0.6])
    assert first["retrieved_texts"] == ["丙", "甲", "乙"] and first["text_similarity"] == [0.8, 0.6, 0.0]
    assert first["retrieved_texts_right"] == [False, True, False] and report.rows[1]["retrieved_texts_right"] == [True, False, True]  # fmt: skip
    found, _ = write(tmp_path / "r.html", report.scores, report.rows, held, RANKING)
    assert "甲 rank 2 +0.800 b.mp4 +0.600 a.mp4" in found.text
    assert "rank 2 丙 +0.800 甲 +0.600 乙 +0.000 a.mp4" in found.text
    assert (
        "Video to text, not first (1 of 1 shown)" in found.text and "Video to text, first (1 of 1 shown)" in found.text
    )
    assert "R@1 50.0 % 50.0 %" in found.text and "any text of a clip counts as correct" in found.text
    hits = [a for tag, a in found.tags if tag == "figure" and a["class"] == "hit"]
    assert len(hits) == 3


def test_matching_shows_match_scores(tmp_path: Path):
    _, held = ranked()
    head = np.array([[0.25, 0.5, -np.inf], [0.75, 0.125, 1.0]], np.float32)
    rows = [
        {"index": np.int64(i), "head": line, "scored": np.isfinite(line), "fallback": np.zeros(3, np.float32)}
        for i, line in enumerate(head[[0, 1, 1]])
    ]
    report = pair_ranking.score(rows, held, ("head",))
    first = report.rows[0]
    assert (first["retrieved"], first["match_score"], first["t2v_rank"]) == (["b.mp4", "a.mp4"], [0.75, 0.25], 2)
    assert first["retrieved_texts"] == ["乙", "甲", "丙"] and first["retrieved_texts_right"] == [False, True, False]
    assert (first["v2t_rank"], first["text_match_score"]) == (2, [0.5, 0.25, None])
    page = example_pages.ranking("match_score", "text_match_score", "head_accuracy")
    found, _ = write(tmp_path / "r.html", report.scores, report.rows, held, page)
    assert "甲 rank 2 +0.750 b.mp4 +0.250 a.mp4" in found.text and "丙 not scored" in found.text


@pytest.mark.parametrize(
    ("page", "row"),
    [
        (CLASSES, {"predicted": "猫", "index": 0}), (CLASSES, {"predicted": "猫", "label": "猫", "top5": {}}), (CAPTIONS, {"caption": "a"}),
        (RANKING, {"text": "甲", "t2v_rank": 9, "retrieved": [], "retrieved_index": [], "id": "x"}),
        (TITLES, {"title": "a", "generated": ""}), (Page(), {"x": 1}), (Page(), {}),
    ],
)  # fmt: skip
def test_missing_fields_do_not_break_the_page(tmp_path: Path, page: Page, row: dict):
    found, _ = write(tmp_path / "r.html", {"loss": float("nan"), "both/head_top1": None}, [row], None, page)
    assert "classify on split validation" in found.text and "loss –" in found.text
    evaluation_report.summary(FACTS, [row], known=KNOWN, page=page)


def test_frames_that_cannot_be_read(tmp_path: Path):
    held = [
        SimpleNamespace(frames=[]),
        SimpleNamespace(frames=[b"", b"broken"]),
        SimpleNamespace(frames=[shards.jpeg(1)]),
    ]
    rows = [classified(i, "猫", "猫", "猫") for i in range(3)] + [classified(9, "猫", "猫", "猫")]
    _, html = write(tmp_path / "r.html", {}, rows, held)
    assert html.count("data:image/jpeg") == 1


def test_curve_settings_and_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (run / "environment.json").write_text(
        json.dumps({"command": ["/x/ymplug_jax/main.py", "--config.optim.warmup=5 steps"]})
    )
    monkeypatch.setattr("sys.argv", ["/x/ymplug_jax/main.py", "--mode=eval"])
    experiment = config.Experiment("language", {"llm": {"vocab": 64}}, config.Data(path="<b>数据</b>"))
    page = Page(chance=lambda scores, rows: chance.tokens(scores, 64, "token_accuracy"))
    found, html = write(
        tmp_path / "r.html", {"token_accuracy": 0.5}, [], None, page, experiment=experiment, workdir=epath.Path(run)
    )
    assert "python -m ymplug_jax.main '--config.optim.warmup=5 steps'" in found.text
    assert "python -m ymplug_jax.main --mode=eval" in found.text and "data.path <b>数据</b>" in found.text
    assert html.count("data:image/png;base64,") == 1 and "50.0 % 1.56 %" in found.text


def test_written_and_printed_results(tmp_path: Path):
    rows = [classified(i, "猫", "猫", "狗", extra=float("nan")) for i in range(21)]
    said = evaluation_report.summary(
        FACTS | {"examples": 21, "both/head_top1": 4.7619, "classes": 45}, rows, known=KNOWN, page=CLASSES
    )
    assert "both: head top-1  4.76 %   chance 2.22 %" in said and "10 of 21 examples shown:" in said
    assert said.count("title: 第") == 10
    evaluation_files.write(
        epath.Path(tmp_path), {"loss": float("inf"), "r": 0.5}, Report({}, [rows[0] | {"id": "\udcff.mp4"}])
    )
    text = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text and json.loads(text)["id"] == "\udcff.mp4" and json.loads(text)["extra"] is None
    assert json.loads((tmp_path / "scores.json").read_text()) == {"loss": None, "r": 0.5}
    write(tmp_path / "r.html", {}, [rows[0] | {"id": "\udcff.mp4"}], None)


def test_seeds_are_printed_with_units():
    result = {"task": "caption", "split": "test", "seeds": [42, 43], "bleu4": {"mean": 0.25, "std": 0.0125}, "loss": {"mean": 2.0, "std": 0.5}}  # fmt: skip
    assert evaluation_report.summary_of_seeds(result, (*scores.captions(), *scores.losses("loss"))).split("\n") == [
        "caption on test, seeds 42, 43:",
        "BLEU-4  25.0 ± 1.25 %",
        "loss    2.00 ± 0.500 nats",
    ]


def test_a_long_text_is_truncated(tmp_path: Path):
    found, _ = write(tmp_path / "r.html", {}, [{"caption": "长" * 5000, "references": ["对" * 5000]}], None, CAPTIONS)
    assert max(map(len, found.text.split())) == 400 and "长…" in found.text
