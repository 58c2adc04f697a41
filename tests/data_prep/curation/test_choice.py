"""Choices over a corpus: bounded pairs, chains of duplicates, representatives, caps and samples."""

import numpy as np

from data_prep.curation import choice
from data_prep.curation.candidates import bucket_pairs


def test_small_buckets_give_all_pairs_and_large_ones_neighbours():
    keys = np.array([5] * 4 + [9] * 1000 + [7], np.uint64)
    rows = np.arange(len(keys))
    order = np.random.default_rng(0).permutation(len(keys)).astype(np.uint64)
    pairs = bucket_pairs(keys, rows, order, all_pairs=8, reach=3)
    small = pairs[pairs[:, 1] < 4]
    assert small.tolist() == [[a, b] for a in range(4) for b in range(a + 1, 4)]
    large = pairs[pairs[:, 0] >= 4]
    assert len(large) == 3 * 1000 - 6 and len(pairs) == len(small) + len(large)
    ranks = np.argsort(np.argsort(order[4:1004]))
    assert np.abs(np.diff(ranks[large - 4], axis=1)).max() == 3, "neighbours in the order of the pictures"


def test_pairs_are_distinct_and_never_of_a_row_with_itself():
    keys = np.array([1, 1, 1, 2, 2], np.uint64)
    rows = np.array([3, 8, 3, 8, 3])
    assert bucket_pairs(keys, rows, np.zeros(5, np.uint64)).tolist() == [[3, 8]]
    assert bucket_pairs(keys[:0], rows[:0], keys[:0]).shape == (0, 2)


def test_chains_of_pairs_and_equal_contents_are_one_cluster():
    contents = np.array([1, 2, 3, 3, 0, 0, 7], np.uint64)
    alive = np.array([1, 1, 1, 1, 1, 1, 0], bool)
    found = choice.clusters(np.array([[0, 1], [1, 2], [4, 6]]), contents, alive)
    assert found.rows.tolist() == [0, 1, 2, 3] and len(set(found.labels.tolist())) == 1
    names = ["d", "c", "b", "a"]
    best = choice.representatives(found, names, np.array([9.0, 9, 9, 4]), np.array([5.0, 5, 4, 9]))
    assert best.tolist() == [1] * 4, "the largest picture, then the longest, then the smallest name"
    assert len(set(choice.cluster_names(found, names))) == 1
    none = choice.clusters(np.zeros((0, 2), np.int64), np.zeros(3, np.uint64), np.ones(3, bool))
    assert not len(none.rows) and not len(choice.representatives(none, [], np.zeros(0), np.zeros(0)))


def test_caps_and_samples_follow_the_draws():
    alive = np.array([1, 1, 1, 1, 0, 1, 1], bool)
    sources = np.array([4, 4, 4, 0, 4, 0, 5], np.uint64)
    draws = np.array([30, 10, 20, 5, 1, 6, 7], np.uint64)
    assert choice.over_cap(alive, sources, draws, 2).tolist() == [True, *[False] * 6]
    assert np.flatnonzero(alive & ~choice.over_target(alive, draws, 3)).tolist() == [3, 5, 6]


def test_series_are_counted():
    assert choice.series_counts(np.array([3, 0, 3, 9, 0], np.uint64)).tolist() == [2, 0, 2, 1, 0]
