"""Scores on hand-made rows: ties, several rows of a clip, and values that are not finite."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ymplug_jax.core import exits
from ymplug_jax.data.records import Record
from ymplug_jax.tasks.common import (
    caption_metrics,
    caption_report,
    class_votes,
    gallery,
    losses,
    matching,
    pair_losses,
    pair_ranking,
    preprocess,
    task_metrics,
)
from ymplug_jax.tasks.mplug_video import caption, match, pretrain

NAMES = ("猫", "狗", "鸟")


def record(name: str, *captions: str, title: str = "", label: str = "") -> Record:
    index = NAMES.index(label) if label else -1
    return Record(name, [], np.zeros(0, np.int64), title, list(captions), label, index)


def recalls_of(rows: list[dict], name: str) -> list[float]:
    """R@1, R@5 and R@10 in percent from the ranks of readable rows."""
    return [100 * sum(row[name] <= k for row in rows) / len(rows) for k in (1, 5, 10)]


def pairs_of(records: list[Record], scores: np.ndarray, scored: np.ndarray, **more) -> list[dict]:
    """Rows of a matching task from scores f32[videos, texts]; clips are numbered by first appearance."""
    clip = gallery.clips_of([one.media_id for one in records])[0]
    return [
        {"index": i, "match": scores[c], "scored": scored[c], "fallback": np.zeros(len(records), np.float32)}
        | {name: values[c] for name, values in more.items()}
        for i, c in enumerate(clip)
    ]


def test_retrieval_counts_by_clip_and_ties_against_the_model() -> None:
    """Clip a has two texts; b and c have the same text and tie, so neither has rank 1."""
    records = [record("a", "甲"), record("b", "乙"), record("a", "丙"), record("c", "乙")]
    text = np.array([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, 1]], np.float32)
    video = np.array([[0.8, 0.6, 0], [0, 0, 1], [9, 9, 9], [0, 0, 1]], np.float32)  # the first row of a clip counts
    rows = [{"index": i, "text": text[i], "video": video[i]} for i in range(4)]
    report = gallery.rank_all(rows, records)
    assert [row["t2v_rank"] for row in report.rows] == [1, 2, 1, 2]
    assert [row["v2t_rank"] for row in report.rows] == [1, 2, 1, 2]
    assert [row["retrieved"] for row in report.rows] == [["a", "b", "c"], ["b", "c", "a"]] * 2
    assert (report.scores["videos"], report.scores["texts"], report.scores["t2v_r1"]) == (3, 4, 50)
    assert report.scores["v2t_r1"] == pytest.approx(100 / 3) and "note" not in report.scores
    assert recalls_of(report.rows, "t2v_rank") == [report.scores[f"t2v_r{k}"] for k in (1, 5, 10)]
    several = [one._replace(captions=[*one.captions, "别"]) for one in records]
    assert "4 rows have several captions" in gallery.rank_all(rows, several).scores["note"]


def test_a_single_example_has_rank_one() -> None:
    report = gallery.rank_all([{"index": 0, "text": np.ones(2), "video": np.ones(2)}], [record("a", "甲")])
    assert report.scores["r_mean"] == 100 and report.rows[0]["t2v_rank"] == 1


def test_the_video_of_a_vector_that_is_not_finite_is_named() -> None:
    records = [record(name, "甲") for name in "abc"]
    for key in ("text", "video"):
        rows = [{"index": i, "text": np.ones(2), "video": np.ones(2)} for i in range(3)]
        rows[1][key] = np.array([0, np.nan])
        with pytest.raises(
            exits.Mistake, match=rf"b \(example 1 of the split\): the model's '{key}' is nan, in 1 of 3"
        ):
            gallery.rank_all(rows, records)


def test_matching_counts_by_clip_and_ties_against_the_model() -> None:
    records = [record("a", "甲"), record("b", "乙"), record("a", "丙")]
    scores = np.array([[2, 0, 1], [0, 0, 1]], np.float32)
    report = pair_ranking.score(pairs_of(records, scores, np.ones((2, 3), bool)), records, ("match",))
    assert [row["t2v_rank"] for row in report.rows] == [1, 2, 2]
    assert [row["v2t_rank"] for row in report.rows] == [1, 3, 1]  # for b one text scores higher and one ties
    assert report.scores["match/t2v_r1"] == pytest.approx(100 / 3) and report.scores["match/v2t_r1"] == 50
    assert report.scores["match/v2t_mean_rank"] == 2
    assert [row["retrieved"] for row in report.rows] == [["a", "b"]] * 3
    assert report.rows[1]["retrieved_texts"] == ["丙", "甲", "乙"]
    assert report.rows[1]["retrieved_texts_right"] == [False, False, True]
    assert report.rows[1]["text_match_score"] == [1, 0, 0]


def test_unscored_pairs_come_last_ordered_by_similarity() -> None:
    """Close similarities keep their order below scores of thousands, which float32 could not represent."""
    records = [record(str(i), "甲") for i in range(4)]
    scores = np.full((4, 4), -np.inf, np.float32)
    scores[0], scored = [-5000, -9000, -7000, 3], np.zeros((4, 4), bool)
    scored[0] = True
    fallback = np.array(
        [[0.9] * 4, [0.1, 0.50002, 0.1, 0.1], [0.1, 0.50001, 0.1, 0.1], [0.1, 0.5, 0.1, 0.1]], np.float32
    )
    report = pair_ranking.score(pairs_of(records, scores, scored, fallback=fallback), records, ("match",))
    assert report.rows[1]["retrieved"] == ["0", "1", "2", "3"] and report.rows[1]["t2v_rank"] == 2
    assert report.rows[1]["match_score"] == [-9000, None, None, None]  # None: shown as "not scored"
    assert report.rows[3]["t2v_rank"] == 4  # one video was scored, and two tie with it


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_not_an_unscored_pair(bad: float) -> None:
    records = [record(name, "甲") for name in "abc"]
    scores, scored = np.full((3, 3), -np.inf, np.float32), np.eye(3, dtype=bool)
    scores[scored] = 1
    pair_ranking.score(pairs_of(records, scores, scored), records, ("match",))
    scored[1, 2], scores[1, 2] = True, bad
    message = (
        rf"b \(example 1 of the split\) with the text of c \(example 2 of the split\): the model's 'match' is {bad}"
    )
    with pytest.raises(exits.Mistake, match=message):
        pair_ranking.score(pairs_of(records, scores, scored), records, ("match",))


def test_both_stages_of_retrieval_agree_with_their_rows() -> None:
    records = [record(name, name) for name in "abcd"]
    units = np.eye(4, dtype=np.float32)
    scores = np.array([[1, 5, 0, 0], [1, 4, 0, 0], [1, 0, 3, 0], [1, 0, 0, 0]], np.float32)
    similarity = np.arange(16, dtype=np.float32).reshape(4, 4) / 16
    rows = pairs_of(records, scores, np.ones((4, 4), bool), video=units, text=units, fallback=similarity)
    report = matching.report(rows, records)
    assert [row["t2v_rank"] for row in report.rows] == [4, 2, 1, 4]
    assert [row["v2t_rank"] for row in report.rows] == [2, 1, 1, 4]
    assert [row["similarity_rank"] for row in report.rows] == [1] * 4
    assert recalls_of(report.rows, "t2v_rank") == [report.scores[f"match/t2v_r{k}"] for k in (1, 5, 10)]
    assert recalls_of(report.rows, "v2t_rank") == [report.scores[f"match/v2t_r{k}"] for k in (1, 5, 10)]
    assert report.rows[1]["retrieved"] == ["a", "b", "c", "d"]
    assert report.rows[1]["similarity"] == [0.0625, 0.3125, 0.5625, 0.8125]  # similarities of the retrieved videos


def test_an_index_of_other_videos_is_refused(tmp_path) -> None:
    videos, clip = [preprocess.hash_of(name) for name in "ab"], np.array([0, 1])
    units = np.eye(2, dtype=np.float32)
    options = match.Options(candidates=str(tmp_path / "index.npz"), best=1)

    def read(**changes) -> np.ndarray:
        index = {"video": units, "text": units, "video_id": np.array(["a", "b"]), "text_clip": clip} | changes
        np.savez(options.candidates, **index)
        return match._from_index(options, videos, clip)[0]

    np.testing.assert_array_equal(read(), np.eye(2, dtype=bool))
    for changes in ({"video_id": np.array(["b", "a"])}, {"text_clip": np.array([0, 0])}):
        with pytest.raises(exits.Mistake, match=r"^config\.options\.candidates .*index\.npz: of other videos or texts"):
            read(**changes)
    with pytest.raises(exits.Mistake, match=r"text 1: the vector in .*index\.npz is nan"):
        read(text=np.array([[0, 0], [0, np.nan]]))


def votes_of(head: np.ndarray, labels: list[int]) -> list[dict]:
    return [{"index": i, "label": labels[i], "head": np.stack([line] * 3)} for i, line in enumerate(head)]


def test_scores_and_rows_treat_ties_alike() -> None:
    """A tie counts as missed in top-1, in "predicted" and therefore in the confusion matrix."""
    records = [record(str(i), label=label) for i, label in enumerate(("猫", "狗", "鸟", "狗"))]
    votes = np.array([[3, 3, 0], [1, 2, 0], [3, 2, 2], [1, 1, 1]], np.float32)
    report = class_votes.report(votes_of(votes, [0, 1, 2, 1]), records, NAMES, ("head",))
    assert [row["predicted"] for row in report.rows] == ["狗", "狗", "猫", "猫"]
    assert [row["both/head"] for row in report.rows] == ["狗", "狗", "猫", "猫"]
    assert [list(row["top5"]).index(row["label"]) + 1 for row in report.rows] == [2, 1, 3, 3]
    assert report.scores["both/head_top1"] == 25 and report.scores["title/head_top5"] == 100
    assert bool(jnp.all(losses.chosen(votes, np.array([0, 1, 2, 1])) == np.array([False, True, False, False])))


def test_votes_with_underflowing_shares_keep_their_order() -> None:
    report = class_votes.report(
        votes_of(np.array([[-900.0, 0, -800]]), [2]), [record("a", label="鸟")], NAMES, ("head",)
    )
    assert list(report.rows[0]["top5"]) == ["狗", "鸟", "猫"]


def test_unlisted_labels_count_as_missed() -> None:
    records = [record("a")._replace(label_text="鱼")] * 2
    report = class_votes.report(votes_of(np.eye(3)[:2], [-1, -1]), records, NAMES, ("head",))
    assert (report.scores["labelled"], report.scores["unlisted"], report.scores["both/head_top5"]) == (2, 2, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_video_of_a_vote_that_is_not_finite_is_named(bad: float) -> None:
    records = [record(name, label="猫") for name in "abc"]
    rows = votes_of(np.eye(3), [0, 0, 0])
    rows[2]["head"] = np.full((3, 3), bad)
    with pytest.raises(
        exits.Mistake, match=rf"c \(example 2 of the split\): the model's 'head' is {bad}, in 1 of 3 rows"
    ):
        class_votes.report(rows, records, NAMES, ("head",))


def test_accuracies_of_a_loss_count_ties_against_the_model() -> None:
    logits = jnp.zeros((2, 3, 2))
    valid = jnp.ones(2, bool)
    assert float(pair_losses.matching(logits, valid, valid)[2]) == 0
    assert (
        float(losses.words_and_head((0.0, 1.0), logits[:, 0], jnp.zeros(2, int), valid)[1]["head_accuracy"].total) == 0
    )
    votes = jnp.array([[jnp.nan, 1.0], [2.0, 1.0], [2.0, jnp.nan]])
    assert losses.chosen(votes, jnp.array([0, 0, 0])).tolist() == [False, True, False]
    assert losses.chosen(votes[1:2], jnp.array([-1])).tolist() == [False]


def test_references_of_all_rows_of_a_clip_count() -> None:
    """One prediction per clip is scored against the references of all its rows, which need not be neighbours."""
    rows = [{"index": i} for i in range(4)]
    records = [
        record("a", "黑色的键盘"),
        record("b", "一只猫在睡觉"),
        record("a", "一块键盘的特写", "键盘"),
        record("a"),
    ]
    said = ["一块键盘的特写", "一只狗", "别的", "别的"]
    scores, answers = caption_report.report_of(said, rows, records)
    assert (scores["rows"], scores["clips"], scores["labelled"], scores["references"]) == (4, 2, 2, 4)
    assert [answer["references"] for answer in answers] == [["黑色的键盘", "一块键盘的特写", "键盘"], ["一只猫在睡觉"]]
    assert [(answer["index"], answer["caption"]) for answer in answers] == [(0, "一块键盘的特写"), (1, "一只狗")]
    assert answers[0]["rouge_l"] == answers[0]["meteor"] == 1  # matches the reference of a later row
    # Computed by hand: 9 of 10 characters match, with a brevity penalty for length 10 against 7 + 6.
    assert scores["bleu1"] == pytest.approx(0.9 * np.exp(1 - 13 / 10))


def test_one_clip_has_cider_zero_and_a_note() -> None:
    scores, answers = caption_report.report_of(["键盘"], [{"index": 0}], [record("a", "键盘")])
    assert scores["bleu1"] == pytest.approx(1) and scores["cider"] == 0 and "CIDEr" in scores["note"]
    scores, answers = caption_report.report_of(["键盘"], [{"index": 0}], [record("a")])
    assert "nothing is scored" in scores["note"] and answers[0]["references"] == []


def test_references_without_chinese_are_refused() -> None:
    records = [record("a", "黑色的键盘"), record("b", "a black keyboard 3.5")]
    with pytest.raises(
        exits.Mistake, match=r"b \(example 1 of the split\): the reference 'a black keyboard 3.5' has no Chinese"
    ):
        caption_report.report_of(["", ""], [{"index": 0}, {"index": 1}], records)
    with pytest.raises(ValueError, match="item 1: the reference 'cat' is not in the language 'zh'"):
        caption_metrics.score(["一", "二"], [["一"], ["二", "cat"]])
    with pytest.raises(exits.Mistake, match=r'set config\.options\.language="en"'):
        caption_report.report_of(["", ""], [{"index": 0}, {"index": 1}], records)
    english = [record("a", "a cat"), record("b", "a dog", "一只狗")]
    with pytest.raises(
        exits.Mistake, match=r"^b \(example 1 of the split\): the reference '一只狗' has .*language=\"zh\""
    ):
        caption_report.report_of(["a", "b"], [{"index": 0}, {"index": 1}], english, "en")


def test_generated_captions_of_another_language_are_said_to_count_as_empty() -> None:
    """A caption without tokens scores 0; that all of them lack tokens, though they are not empty, is in the note."""
    records = [record("a", "黑色的键盘"), record("b", "一只猫")]
    rows = [{"index": 0}, {"index": 1}]
    scores, _ = caption_report.report_of(["", "a cat"], rows, records)
    assert scores["bleu1"] == 0 and "no generated caption is in the language" in scores["note"]
    for some in (["", ""], ["a", "猫"]):
        assert "note" not in caption_report.report_of(some, rows, records)[0]
    english = [record("a", "a cat"), record("b", "a dog")]
    scores, _ = caption_report.report_of(["?", "一只猫"], rows, english, "en")
    assert scores["rouge_l"] == 0 and "no generated caption" in scores["note"]


def test_english_captions_are_scored_by_words() -> None:
    records = [record("a", "A man's dog."), record("b", "a red-hot car")]
    scores, answers = caption_report.report_of(["a man 's dog", "a car"], [{"index": 0}, {"index": 1}], records, "en")
    assert (scores["language"], answers[0]["rouge_l"]) == ("en", 1) and scores["cider"] > 0
    assert scores["bleu1"] == pytest.approx(np.exp(1 - 7 / 6))  # 6 of 6 words, references of 4 and 3
    assert "meteor" not in scores and "meteor" not in answers[0] and "METEOR is left out" in scores["note"]
    known = [score.name for score in caption_report.scores_of(caption.SCORES, "en")]
    assert "meteor" not in known and {name for name in scores if name in known} >= {"bleu4", "rouge_l", "cider"}
    assert caption_report.scores_of(caption.SCORES, "zh") == caption.SCORES


@pytest.mark.parametrize(("language", "said"), [("en", "a man playing"), ("zh", "amanplaying")])
def test_the_captioning_task_speaks_the_language_of_its_option(tmp_path: Path, language: str, said: str) -> None:
    """Generated ids become words with spaces, in the scores and in the answer of `predict caption`."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "play", "##ing"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    options = {"language": language, "prompt_tokens": 4, "new_tokens": 6}
    made = dataclasses.replace(tiny.experiment(data={"tokenizer": str(tmp_path / "vocab.txt")}), options=options)
    task = caption.make(made)
    records = [record("a", "a man is playing" if language == "en" else "一个人")]
    row = {"index": np.array(0), "generated": np.array([5, 6, 7, 8, 3, 0], np.int32)}
    report = task.score([row], records)
    assert report.rows[0]["caption"] == said and report.scores["language"] == language
    assert task.describe["caption"](row, records[0], 1).json["caption"] == said
    assert ("meteor" in report.scores) == ("meteor" in {score.name for score in task.scores}) == (language == "zh")
    task.scorable(records[0])
    with pytest.raises(exits.Mistake, match=rf'^b: the reference .* set config\.options\.language="{language}"'):
        caption_report.checker("zh" if language == "en" else "en")(record("b", *records[0].captions))


def test_unknown_language_of_captions() -> None:
    with pytest.raises(ValueError, match=r"config\.options\.language: unknown language 'de'; choose one of zh, en"):
        caption_report.checker("de")


def test_titles_of_all_rows_of_a_clip_count_as_correct() -> None:
    texts: Callable[[np.ndarray], str] = "甲乙丙丁".__getitem__
    records = [record("a"), record("b"), record("a")]
    rows = [{"index": i, "ids": ids, "generated": said} for i, (ids, said) in enumerate([(0, 2), (1, 3), (2, 2)])]
    report = pretrain.report_of(rows, records, texts)
    assert (report.scores["exact_titles"], report.scores["clips"], report.scores["exact_share"]) == (1, 2, 0.5)
    assert [(row["title"], row["generated"]) for row in report.rows] == [("丙", "丙"), ("乙", "丁")]
    assert report.rows[0]["titles"] == ["甲", "丙"]


def test_names_of_examples() -> None:
    assert task_metrics.example_name({"index": 1}, [record("a"), record("b")]) == "b (example 1 of the split)"
