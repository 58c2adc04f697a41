"""Choices over a whole corpus: titles in series, one clip of each cluster of duplicates, caps of sources and a sample.

All functions take and return arrays with a value for each row. No result depends on the order of the rows.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

DUPLICATES = {
    "exact_duplicate": "the file has the same bytes as the clip that is kept of its cluster",
    "near_duplicate": "the pictures are those of another clip, which is kept of the cluster",
}
DIVERSITY = {
    "source_cap": "its source has more clips than the limit",
    "not_sampled": "the sample of --target clips has others",
}


class Clusters(NamedTuple):
    """Clips connected by duplicates."""

    rows: np.ndarray  # int64[m], rows in clusters of two or more, ascending
    labels: np.ndarray  # int64[m], equal for the rows of a cluster


def series_counts(keys: np.ndarray) -> np.ndarray:
    """Return how many rows have the key of each row: int64[n]; 0 where the key is 0."""
    _, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    return np.where(keys == 0, 0, counts[inverse])


def clusters(pairs: np.ndarray, contents: np.ndarray, alive: np.ndarray) -> Clusters:
    """Connect rows by pairs that are alike and by equal contents, through any number of steps.

    Args:
      pairs: int64[p, 2].
      contents: uint64[n], hash of a file's bytes; 0: unknown.
      alive: bool[n], rows that take part.
    """
    pairs = pairs[alive[pairs].all(1)] if len(pairs) else pairs
    known = np.flatnonzero(alive & (contents != 0))
    known = known[np.argsort(contents[known], kind="stable")]
    same = contents[known][1:] == contents[known][:-1]
    edges = np.concatenate([pairs, np.stack([known[:-1][same], known[1:][same]], 1)]).astype(np.int64)
    rows, places = np.unique(edges, return_inverse=True)
    places = places.reshape(-1, 2)
    graph = coo_array((np.ones(len(places), bool), (places[:, 0], places[:, 1])), shape=(len(rows), len(rows)))
    labels = connected_components(graph, directed=False)[1] if len(rows) else np.zeros(0, np.int64)
    return Clusters(rows, labels.astype(np.int64))


def representatives(found: Clusters, names: Sequence[str], areas: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return the row that is kept of the cluster of each row of `found`: the largest picture, then the longest, then the smallest name.

    Args:
      found: clusters.
      names: of its rows.
      areas: float[m], pixels of a frame.
      seconds: float[m].
    """
    ranks = np.empty(len(names), np.int64)
    ranks[sorted(range(len(names)), key=lambda i: names[i])] = np.arange(len(names))
    order = np.lexsort((ranks, -seconds, -areas, found.labels))
    first = np.append(True, np.diff(found.labels[order]) != 0) if len(order) else np.zeros(0, bool)
    best = np.empty(int(first.sum()), np.int64)
    best[found.labels[order][first]] = found.rows[order][first]
    return best[found.labels]


def cluster_names(found: Clusters, names: Sequence[str]) -> list[str]:
    """Return the id of the cluster of each row of `found`: 16 hexadecimal digits, made of the smallest name in it."""
    smallest: dict[int, str] = {}
    for label, name in zip(found.labels.tolist(), names, strict=True):
        smallest[label] = min(name, smallest.get(label, name))
    made = {label: hashlib.blake2b(name.encode(), digest_size=8).hexdigest() for label, name in smallest.items()}
    return [made[label] for label in found.labels.tolist()]


def draw(seed: int, name: str) -> int:
    """Return the place of a clip in the sampling order, a 64-bit number."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


def over_cap(alive: np.ndarray, sources: np.ndarray, draws: np.ndarray, most: int) -> np.ndarray:
    """Return the rows beyond `most` of each source (0: unknown, no limit), in the order of `draws`: bool[n]."""
    over = np.zeros(len(alive), bool)
    rows = np.flatnonzero(alive & (sources != 0))
    rows = rows[np.lexsort((draws[rows], sources[rows]))]
    starts = np.flatnonzero(np.append(True, np.diff(sources[rows]) != 0)) if len(rows) else np.zeros(0, np.int64)
    sizes = np.diff(np.append(starts, len(rows)))
    nth = np.arange(len(rows)) - np.repeat(starts, sizes)
    over[rows[nth >= most]] = True
    return over


def over_target(alive: np.ndarray, draws: np.ndarray, target: int) -> np.ndarray:
    """Return the rows beyond the first `target` in the order of `draws`: bool[n]."""
    over = np.zeros(len(alive), bool)
    rows = np.flatnonzero(alive)
    over[rows[np.argsort(draws[rows], kind="stable")][target:]] = True
    return over
