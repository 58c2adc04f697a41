"""Ranks, recalls and the gallery ranking against the plain matrix."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ymplug_jax.tasks import metrics, ranking


def test_top_k_counts_ties_as_a_sort_would():
    scores = np.array([[0.5, 0.5, 0.1], [0.1, 0.5, 0.5]])
    assert metrics.top_k(scores, np.array([1, 1]), 1) == 50
    assert metrics.top_k(scores, np.array([1, 2]), 2) == 100


def test_recalls_of_known_ranks():
    scores = metrics.recalls(np.array([1, 2, 11, 6]), np.array([1, 1, 1, 1]))
    assert (scores["v2t_r1"], scores["v2t_r5"], scores["v2t_r10"]) == (25, 50, 75)
    assert scores["v2t_median_rank"] == 4 and scores["t2v_r_mean"] == 100 and scores["r_mean"] == 75


def test_mean_and_deviation_over_seeds():
    runs = [{"a": 1.0, "split": "validation", "n": 3}, {"a": 3.0, "split": "validation", "n": 3}]
    assert metrics.over_seeds(runs) == {"a": {"mean": 2.0, "std": pytest.approx(2**0.5)}}


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
    # Entries that are equal but for rounding may change places.
    top = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    low, high = 1 + (scores > top + 1e-5).sum(axis=1), 1 + (scores > top - 1e-5).sum(axis=1)
    assert ((low <= ranks) & (ranks <= high))[known].all()
    assert (ranks[~known] == size + 1).all()
    expected = -np.sort(-scores, axis=1)[:, :6]
    np.testing.assert_allclose(similarity, expected, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, best, axis=1), expected, atol=1e-5)
