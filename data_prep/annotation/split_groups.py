"""Splits that related clips do not straddle: clips of one source, one duplicate cluster or one title stay together."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

SPLITS = ("train", "val", "test")


def groups_of(keys: Sequence[Sequence[str]]) -> np.ndarray:
    """Number the groups of rows that share keys, directly or through a chain of other rows.

    Args:
      keys: of each row, for example its source, cluster and title. An empty key is none.

    Returns:
      Group of each row, int32[N].
    """
    known = {key: i for i, key in enumerate(dict.fromkeys(key for row in keys for key in row if key))}
    pairs = [(i, len(keys) + known[key]) for i, row in enumerate(keys) for key in row if key]
    rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T
    size = len(keys) + len(known)  # rows and keys are the nodes of one graph
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), (size, size))
    return connected_components(graph, directed=False)[1][: len(keys)]


def split_groups(
    ids: Sequence[str], keys: Sequence[Sequence[str]], shares: Mapping[str, float], seed: int
) -> list[str]:
    """Assign rows to splits so that rows with a common key, or a chain of them, are in one split.

    The groups, the largest first and equal ones in an order drawn from the seed, go each to the split that lacks most rows. The result
    depends on ids, keys, shares and seed, not on the order of the rows.

    Args:
      ids: of the rows; rows with one id stay together too.
      keys: of the rows, see `groups_of`.
      shares: split -> share of the rows, with the sum 1.
      seed: of the order.

    Returns:
      The split of each row. A split gets exactly its share if the groups allow it; a split of the share 0 gets nothing.

    Raises:
      ValueError: the shares are negative, or their sum is not 1.
    """
    if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares {dict(shares)}: not shares of a whole; give numbers of at least 0 with the sum 1")
    group = groups_of([[*row, f"\x00{name}"] for name, row in zip(ids, keys, strict=True)])
    members: dict[int, list[str]] = {}
    for name, number in zip(ids, group.tolist(), strict=True):
        members.setdefault(number, []).append(name)
    order = sorted(members, key=lambda number: (-len(members[number]), _digest(seed, min(members[number]))))
    lacking = {split: share * len(ids) for split, share in shares.items() if share > 0}
    chosen: dict[int, str] = {}
    for number in order:
        split = max(lacking, key=lambda one: lacking[one])
        lacking[split] -= len(members[number])
        chosen[number] = split
    return [chosen[number] for number in group.tolist()]


def _digest(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode("utf-8", "surrogateescape")).hexdigest()
