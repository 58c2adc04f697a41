"""Ranks, recalls and gallery ranking, compared with the full similarity matrix."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ymplug_jax.core import exits
from ymplug_jax.tasks.common import pair_scoring, ranking, task_metrics


def test_ties_count_against_the_label():
    scores = np.array([[0.5, 0.5, 0.1], [0.1, 0.5, 0.5], [0.9, 0.5, 0.1]])
    assert task_metrics.class_ranks(scores, np.array([1, 1, 0])).tolist() == [2, 2, 1]
    assert task_metrics.top_k(scores, np.array([1, 1, 0]), 1) == pytest.approx(100 / 3)
    assert task_metrics.top_k(scores, np.array([1, 2, 0]), 2) == 100


def test_a_collapsed_model_finds_nothing():
    """With 50 equal vectors chance is 2 %; counting ties as found would give 100 %."""
    ids, vectors = np.arange(50), np.ones((50, 4), np.float32) / 2
    ranks = ranking.rank(vectors, vectors, ids, ids)[0]
    assert ranks.tolist() == [50] * 50
    assert task_metrics.recalls(ranks, ranks)["t2v_r10"] == task_metrics.top_k(np.zeros((50, 45)), ids % 45, 5) == 0
    assert task_metrics.ranks_in(np.zeros((2, 3)), np.array([[True, True, False], [False, False, False]])).tolist() == [
        2,
        4,
    ]


def test_correct_entries_do_not_tie_with_each_other():
    """One clip has two equal texts, and two clips share a text: only the entry of the other clip is wrong."""
    clip = np.array([0, 0, 1, 2])
    texts = np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32)  # clips 0 and 1 have the same text
    videos = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    assert ranking.rank(videos, texts, np.arange(3), clip)[0].tolist() == [2, 3, 1]
    assert ranking.rank(texts, videos, clip, np.arange(3))[0].tolist() == [2, 2, 2, 1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_without_an_order_are_refused(bad: float):
    scores = np.zeros((5, 3), np.float32)
    scores[3, 1] = bad
    labels = np.zeros(5, int)
    for call in (
        lambda: task_metrics.top_k(scores, labels, 1),
        lambda: task_metrics.ranks_in(scores, np.eye(5, 3, dtype=bool)),
        lambda: ranking.rank(scores, scores[:2], labels, labels[:2]),
    ):
        with pytest.raises(exits.Mistake, match=rf"(row|query) 3: .* is {bad}, in 1 of 5 rows"):
            call()
    with pytest.raises(exits.Mistake, match=f"entry 3 of the gallery: .* is {bad}"):
        ranking.rank(scores[:2], scores, labels[:2], labels)
    with pytest.raises(exits.Mistake, match="query 0: the similarity is inf"):
        ranking.rank(np.full((1, 2), 3e38, np.float32), np.ones((2, 2), np.float32) * 9, labels[:1], labels[:2])


def test_nothing_to_rank_is_refused():
    one, ids = np.ones((1, 2), np.float32), np.zeros(1, int)
    with pytest.raises(ValueError, match="0 queries and 1 entries"):
        ranking.rank(one[:0], one, ids[:0], ids)
    ranks, order, _ = ranking.rank(one, one, ids, ids)
    assert (ranks.tolist(), order.tolist()) == ([1], [[0]])


def test_order_puts_the_label_after_its_ties():
    scores = np.array([0.2, 0.7, 0.7, 0.1, 0.7])
    assert task_metrics.order(scores).tolist() == [1, 2, 4, 0, 3]
    assert task_metrics.order(scores, 1).tolist() == [2, 4, 1, 0, 3]
    assert task_metrics.order(scores, 3).tolist() == [1, 2, 4, 0, 3]
    for label in range(5):
        place = task_metrics.order(scores, label).tolist().index(label)
        assert place + 1 == task_metrics.class_ranks(scores[None], np.array([label]))[0]


@pytest.mark.parametrize("size", [1, 130, 4000])
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_ranking_with_ties_is_a_stable_sort(size: int, devices: int):
    """Products of small integers are exact, so half of all similarities tie; some are -0.0."""
    rng = np.random.default_rng(size)
    queries, gallery = (rng.integers(-1, 2, (n, 2)).astype(np.float32) for n in (20, size))
    q_ids, g_ids = rng.integers(0, 30, 20), rng.integers(0, 30, size)
    found = ranking.rank(queries, gallery, q_ids, g_ids, chunk=16, devices=jax.devices()[:devices])
    scores = queries @ gallery.T
    order = np.argsort(-scores, axis=1, kind="stable")[:, :10]
    np.testing.assert_array_equal(found[1], order)
    np.testing.assert_array_equal(found[2], np.take_along_axis(scores, order, axis=1))
    for rank, line, right in zip(found[0], scores, q_ids[:, None] == g_ids, strict=True):
        assert rank == (1 + sum(line[~right] >= line[right].max()) if right.any() else size + 1)


def test_the_first_of_tied_pairs_are_taken():
    rng = np.random.default_rng(0)
    similarity = rng.integers(0, 3, (7, 9)).astype(np.float32)
    wanted = np.zeros((7, 9), bool)
    np.put_along_axis(wanted, np.argsort(-similarity, axis=1, kind="stable")[:, :2], True, axis=1)
    np.put_along_axis(wanted, np.argsort(-similarity, axis=0, kind="stable")[:2], True, axis=0)
    np.testing.assert_array_equal(pair_scoring.best_of(similarity, 2), wanted)
    assert pair_scoring.best_of(similarity, 100).all()


def test_recalls_of_known_ranks():
    scores = task_metrics.recalls(np.array([1, 2, 11, 6]), np.array([1, 1, 1, 1]))
    assert (scores["v2t_r1"], scores["v2t_r5"], scores["v2t_r10"]) == (25, 50, 75)
    assert scores["v2t_median_rank"] == 4 and scores["t2v_r_mean"] == 100 and scores["r_mean"] == 75


def test_mean_and_deviation_over_seeds():
    runs = [{"a": 1.0, "split": "validation", "n": 3}, {"a": 3.0, "split": "validation", "n": 3}]
    assert task_metrics.over_seeds(runs) == {"a": {"mean": 2.0, "std": pytest.approx(2**0.5)}}


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 50), st.sampled_from([1, 3, 8]), st.sampled_from([7, 1024])
)  # fmt: skip
def test_ranking_over_devices_equals_the_matrix(seed: int, queries: int, size: int, devices: int, chunk: int):
    rng = np.random.default_rng(seed)
    q, g = (rng.normal(size=(n, 5)).astype(np.float32) for n in (queries, size))
    g[rng.integers(size)] = g[0]  # equal entries
    q_ids, g_ids = rng.integers(0, 8, queries), rng.integers(0, 8, size)
    ranks, best, similarity = ranking.rank(q, g, q_ids, g_ids, best=6, chunk=chunk, devices=jax.devices()[:devices])
    scores = np.einsum("qe,ge->qg", q.astype(np.float64), g)
    right = q_ids[:, None] == g_ids
    known = right.any(axis=1)
    # Entries that differ only by rounding may swap.
    top = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    low, high = 1 + (scores > top + 1e-5).sum(axis=1), 1 + (scores > top - 1e-5).sum(axis=1)
    assert ((low <= ranks) & (ranks <= high))[known].all()
    assert (ranks[~known] == size + 1).all()
    expected = -np.sort(-scores, axis=1)[:, :6]
    np.testing.assert_allclose(similarity, expected, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, best, axis=1), expected, atol=1e-5)
