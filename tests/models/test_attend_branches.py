"""Attention of branches to a shared past equals plain NumPy attention on each branch's keys."""

import jax
import numpy as np
import pytest

from ymplug_jax.models import attention


def by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Attention of one query f[N, H] to keys and values f[S, K, H], with mask bool[S] and bias f[N, S] -> f[N, H]."""
    n, h = q.shape
    out = np.zeros_like(q)
    for head in range(n):
        group = head // (n // k.shape[1])
        logits = np.where(seen, k[:, group] @ q[head] / np.sqrt(h) + bias[head], -np.inf)
        weights = np.exp(logits - logits.max())
        out[head] = weights / weights.sum() @ v[:, group]
    return out


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_each_branch_sees_the_past_and_its_own(kv_heads: int, alibi: bool, swapped: bool) -> None:
    b, c, length, n, h, s, w = 2, 3, 2, 4, 6, 5, 4
    rng = np.random.default_rng(kv_heads)
    q, *rest = (
        rng.normal(size=shape)
        for shape in ((b, c, length, n, h), *[(b, s, kv_heads, h)] * 2, *[(b, c, w, kv_heads, h)] * 2)
    )
    past, own = rest[:2], rest[2:]
    past_mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]], bool)
    own_mask = np.arange(w) <= 1 + np.arange(length)[:, None]
    slopes, past_at, own_at = rng.random(n), rng.integers(0, 9, (b, s)), rng.integers(9, 20, (b, w))
    origin = rng.integers(0, c, (b, c, w)) if swapped else np.broadcast_to(np.arange(c)[:, None], (b, c, w))
    given = {"origin": origin} if swapped else {}
    given |= {"slopes": slopes, "past_positions": past_at, "own_positions": own_at} if alibi else {}
    with jax.enable_x64(True):
        found = attention.attend_branches(q, tuple(past), tuple(own), past_mask, own_mask, **given)
    for i in range(b):
        for j in range(c):
            mine = [np.stack([x[i, origin[i, j, place], place] for place in range(w)]) for x in own]
            k, v = (np.concatenate([old[i], new]) for old, new in zip(past, mine, strict=True))
            bias = slopes[:, None] * np.concatenate([past_at[i], own_at[i]]) * alibi
            for at in range(length):
                seen = np.concatenate([past_mask[i], own_mask[at]])
                np.testing.assert_allclose(found[i, j, at], by_hand(q[i, j, at], k, v, seen, bias), atol=2e-6)
