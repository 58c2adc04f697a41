"""Candidates for near-duplicates: pairs of clips with a common key, bounded in number whatever the keys are."""

import numpy as np

ALL_PAIRS = 32  # clips in a bucket up to which all pairs are candidates
REACH = 8  # in a larger bucket: a clip is compared with so many that follow it in the order of their pictures


def bucket_pairs(
    keys: np.ndarray, rows: np.ndarray, order: np.ndarray, all_pairs: int = ALL_PAIRS, reach: int = REACH
) -> np.ndarray:
    """Return the pairs of rows to compare, int64[m, 2], the smaller row first, sorted and without repetitions.

    Rows with an equal key are a bucket. A bucket of n rows gives at most `(all_pairs - 1) / 2 * n` pairs, so that a million rows with an
    equal key cost no more than a million rows in small buckets: a large bucket is sorted by `order`, and neighbours are paired. Copies
    are near each other there, and pairs chain them.

    Args:
      keys: uint64[n].
      rows: int64[n], the row of each key.
      order: uint64[n], a value of the row that is close for pictures that are alike.
      all_pairs: size of a bucket up to which all pairs are taken.
      reach: neighbours in a larger one.
    """
    at = np.lexsort((rows, order, keys))
    keys, rows = keys[at], rows[at]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.zeros(0, np.int64)
    sizes = np.diff(np.append(starts, len(keys)))
    end = np.repeat(starts + sizes, sizes)  # [n], behind the bucket of each
    far = np.repeat(np.where(sizes <= all_pairs, all_pairs - 1, reach), sizes)
    found = [np.zeros((0, 2), np.int64)]
    active = np.arange(len(keys))
    for step in range(1, max(all_pairs, reach + 1)):
        active = active[(active + step < end[active]) & (far[active] >= step)]
        if not len(active):
            break
        found.append(np.stack([rows[active], rows[active + step]], 1))
    pairs = np.concatenate(found)
    return distinct(np.sort(pairs, axis=1)[pairs[:, 0] != pairs[:, 1]])


def distinct(pairs: np.ndarray) -> np.ndarray:
    """Return the distinct rows of int64[m, 2], sorted."""
    if not len(pairs):
        return pairs
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    return pairs[np.append(True, (pairs[1:] != pairs[:-1]).any(1))]
