"""Losses equal Python loops, also over a sharded batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ymplug_jax.tasks.common import losses


def units(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def contrastive_by_loops(video: np.ndarray, text: np.ndarray, temperature: float, smoothing: float) -> float:
    n, total = len(video), 0.0
    for scores in (
        [[max(v @ t for v in video[b]) / temperature for t in text] for b in range(n)],
        [[max(v @ text[b] for v in video[g]) / temperature for g in range(n)] for b in range(n)],
    ):
        for b, row in enumerate(np.array(scores, np.float64)):
            logs = row - np.log(np.exp(row).sum())
            target = np.full(n, smoothing / n)
            target[b] += 1 - smoothing
            total -= 0.5 * (target * logs).sum()
    return total


@pytest.mark.parametrize(("rows", "queries"), [(5, 3), (1, 3), (4, 1), (1, 1)])
def test_contrastive_equals_loops(rows: int, queries: int) -> None:
    rng = np.random.default_rng(rows)
    video, text = units(rng, rows, queries, 6), units(rng, rows, 6)
    total, weight = losses.contrastive(video, text, 0.2)
    assert weight == rows
    assert total == pytest.approx(contrastive_by_loops(video, text, 0.2, 0.1), rel=1e-5, abs=1e-6)


def test_contrastive_ignores_padding_rows() -> None:
    rng = np.random.default_rng(0)
    video, text = units(rng, 6, 3, 4), units(rng, 6, 4)
    valid = np.array([1, 0, 1, 1, 0, 1], bool)
    total, weight = losses.contrastive(video, text, 0.1, valid=valid)
    alone, rows = losses.contrastive(video[valid], text[valid], 0.1)
    assert weight == rows == 4
    assert total == pytest.approx(float(alone), rel=1e-5)
    total, weight = losses.contrastive(video, text, 0.1, valid=np.zeros(6, bool))
    assert total == weight == 0


def test_contrastive_over_a_sharded_batch_uses_the_global_batch() -> None:
    assert jax.device_count() == 8
    rng = np.random.default_rng(0)
    inputs = units(rng, 16, 3, 8), units(rng, 16, 8), np.float32(0.07)

    def mean(video: jax.Array, text: jax.Array, temperature: jax.Array) -> jax.Array:
        total, weight = losses.contrastive(video, text, temperature)
        return total / weight

    step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2)))
    one = step(*inputs)
    rows = NamedSharding(
        jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)), PartitionSpec("data")
    )
    cut = step(*jax.device_put(inputs[:2], rows), inputs[2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), cut, one)


def test_bounded_temperature_keeps_its_gradient() -> None:
    rng = np.random.default_rng(0)
    video, text = units(rng, 4, 2, 3), units(rng, 4, 3)
    step = jax.value_and_grad(lambda temperature: losses.contrastive(video, text, temperature)[0])
    low, bound = step(jnp.float32(1e-5)), step(jnp.float32(1e-3))
    np.testing.assert_allclose(low, bound, rtol=1e-4)
    assert bound[1] != 0


def test_next_token_averages_targets_only() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 11, (3, 6))
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])  # the last row pads the batch
    prompt = np.array([1, 2, 0])
    logits = rng.normal(size=(3, 5, 11)).astype(np.float32)
    expected = []
    for b in range(3):
        for j in range(5):
            if mask[b, j + 1] and j >= prompt[b]:
                row = logits[b, j].astype(np.float64)
                expected.append(np.log(np.exp(row).sum()) - row[ids[b, j + 1]])
    total, weight = losses.next_token(logits, ids, mask, prompt)
    assert weight == len(expected) == 5
    assert total == pytest.approx(sum(expected), rel=1e-5)
    assert losses.next_token(logits, ids, mask)[1] == 8


def test_masked_positions_give_no_gradient_even_if_infinite() -> None:
    ids, mask = np.ones((1, 3), np.int32), np.array([[1, 1, 0]])
    logits = jnp.zeros((1, 2, 4)).at[0, 1].set(jnp.inf)
    total, _ = losses.next_token(logits, ids, mask)
    assert total == pytest.approx(np.log(4), rel=1e-5)


@pytest.mark.parametrize("length", [5, 17, 90])
def test_next_token_in_parts_equals_the_whole(length: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(50, 8)).astype(np.float32)
    hidden = rng.normal(size=(3, length - 1, 8)).astype(np.float32)
    ids = rng.integers(0, 50, (3, length))
    mask = (np.arange(length) < np.array([length, length - 2, 0])[:, None]).astype(np.int32)
    prompt = np.array([1, 0, 2])

    def whole(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return losses.next_token(hidden @ table.T, ids, mask, prompt)[0]

    def parts(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return losses.next_token_of(lambda h: h @ table.T, hidden, ids, mask, prompt, positions=7)[0]

    for one, other in zip(
        jax.value_and_grad(whole, (0, 1))(hidden, table), jax.value_and_grad(parts, (0, 1))(hidden, table), strict=True
    ):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), one, other)
    _, count, right = losses.next_token_of(lambda h: h @ table.T, hidden, ids, mask, prompt)
    kept = losses.target_mask(mask, prompt)
    assert count == kept.sum()
    assert right == ((hidden @ table.T).argmax(-1) == ids[:, 1:])[np.asarray(kept)].sum()


def test_logits_of_a_whole_batch_never_exist() -> None:
    """Peak memory of the compiled loss and gradient is bounded by the positions of one part, not by the row."""
    hidden, table = jnp.zeros((8, 128, 64)), jnp.zeros((8192, 64))
    ids = mask = jnp.ones((8, 129), jnp.int32)

    def temporaries(loss) -> int:
        return jax.jit(jax.grad(loss)).lower(hidden).compile().memory_analysis().temp_size_in_bytes

    whole = temporaries(lambda h: losses.next_token(h @ table.T, ids, mask)[0])
    parts = temporaries(lambda h: losses.next_token_of(lambda part: part @ table.T, h, ids, mask)[0])
    assert whole > 8 * 128 * 8192 * 4 > 2 * parts
