"""Fused attention kernels equal plain attention in values and gradients, also sharded; and when each kernel is chosen."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ymplug_jax.analysis import flops
from ymplug_jax.core import sharding
from ymplug_jax.models import attention, kernels

# (B, L, S, N, H, causal); a block is laid out [L, H] for H = 96 and [H, L] for the others
ROWS = [(2, 37, 37, 4, 96, False), (2, 29, 29, 4, 16, True), (1, 16, 75, 2, 8, False)]
FRAMES = [(2, 4, 49, 3, 8), (1, 3, 150, 2, 8), (1, 16, 70, 2, 16)]  # (B, T, P, N, H)


def normal(*shape: int, count: int) -> list[jax.Array]:
    return [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(0), count)]


def agree(one, other, inputs: tuple, grad: jax.Array) -> None:
    """Assert equal values to 1e-5 and gradients to 1e-4 of the largest, in float32."""
    values, back = jax.vjp(one, *inputs)
    wanted, back_wanted = jax.vjp(other, *inputs)
    np.testing.assert_allclose(values, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
    for made, right in zip(back(grad), back_wanted(grad), strict=True):
        np.testing.assert_allclose(made, right, atol=1e-4 * float(jnp.abs(right).max()))


@pytest.mark.parametrize(("b", "length", "keys", "n", "h", "causal"), ROWS)
def test_rows(b: int, length: int, keys: int, n: int, h: int, causal: bool) -> None:
    q, grad = normal(b, length, n, h, count=2)
    k, v = normal(b, keys, n, h, count=2)
    agree(
        lambda *x: kernels.attention(*x, causal=causal, interpret=True),
        lambda *x: attention.attend(*x, causal=causal),
        (q, k, v),
        grad,
    )


# (L, N, K, H, causal, ALiBi, block); the last block of 128 queries extends beyond the row
DECODERS = [
    (40, 4, 2, 16, True, True, None),
    (150, 4, 2, 16, True, True, kernels.Block(1, 128)),
    (150, 2, 2, 96, True, True, kernels.Block(2, 128)),
    (150, 4, 1, 96, False, False, kernels.Block(1, 128)),
]


@pytest.mark.parametrize(("length", "n", "groups", "h", "causal", "alibi", "block"), DECODERS)
def test_decoder_rows(
    length: int, n: int, groups: int, h: int, causal: bool, alibi: bool, block: kernels.Block
) -> None:
    """Grouped queries, padding on either side, an all-padding row, ALiBi, and queries in blocks."""
    q, grad = normal(3, length, n, h, count=2)
    k, v = normal(3, length, groups, h, count=2)
    seen = np.ones((3, length), bool)
    seen[0, :5], seen[1, -4:], seen[2] = False, False, False
    at = jnp.asarray(np.where(seen, seen.cumsum(axis=1) - 1, 0))
    per_key = jnp.stack([at.astype(jnp.float32), jnp.where(seen, 0, kernels.LOWEST)], axis=1)
    slopes = 0.5 ** jnp.arange(1.0, n + 1) if alibi else None
    given = {"slopes": slopes, "key_positions": at} if alibi else {}
    agree(
        lambda *x: kernels.attention(*x, per_key, slopes, None, causal, True, block),
        lambda *x: attention.attend(*x, causal=causal, key_mask=jnp.asarray(seen), **given),
        (q, k, v),
        grad,
    )


# (L, N, K, H, ALiBi, block); with 640 queries a program reads one, two, four or all five blocks of keys
PACKED = [
    (150, 2, 1, 16, True, kernels.Block(1, 128)),
    (384, 2, 2, 16, True, kernels.Block(2, 128)),
    (640, 1, 1, 96, False, kernels.Block(1, 128)),
]


@pytest.mark.parametrize(("length", "n", "groups", "h", "alibi", "block"), PACKED)
def test_packed_rows(length: int, n: int, groups: int, h: int, alibi: bool, block: kernels.Block) -> None:
    """Long and short texts, and padding between and behind them, against plain attention and columns."""
    q, grad = normal(2, length, n, h, count=2)
    k, v = normal(2, length, groups, h, count=2)
    segments = np.zeros((2, length), np.int32)
    ends = [0, length // 20, length // 20 + 1, length * 3 // 4, length - 4]
    for number, (begin, end) in enumerate(itertools.pairwise(ends), 1):
        segments[0, begin:end] = number
    segments[1] = np.where(np.arange(length) % 9, 1 + np.arange(length) // 9, 0)
    segments = jnp.asarray(segments)
    before = jnp.cumsum(segments > 0, axis=1) - 1 - attention.starts(segments)
    at = jnp.where(segments > 0, before, 0)
    slopes = 0.5 ** jnp.arange(1.0, n + 1) if alibi else None
    per_key = attention.per_key(2, length, None, at) if alibi else None
    given = {"slopes": slopes, "key_positions": at} if alibi else {}

    def plain(*x: jax.Array) -> jax.Array:
        return attention.attend(*x, causal=True, segments=segments, **given)

    def fused(*x: jax.Array) -> jax.Array:
        made = kernels.attention(*x, per_key, slopes, segments, True, True, block)
        return attention.tokens_only(made, segments)

    agree(fused, plain, (q, k, v), grad)
    if length <= 150:  # more segments cost digits of the logits
        columns = attention.with_columns(q, k, v, True, None, slopes, at if alibi else None, "xla", segments)
        np.testing.assert_allclose(attention.tokens_only(columns, segments), plain(q, k, v), atol=0.01)


# (L, S, N, H, causal, padding, block)
BESIDE = [
    (37, 37, 4, 64, False, False, None),
    (29, 29, 8, 32, True, True, None),
    (150, 75, 2, 64, False, False, kernels.Block(2, 128, True)),
    (150, 150, 4, 64, True, False, kernels.Block(2, 128, True)),
]


@pytest.mark.parametrize(("length", "keys", "n", "h", "causal", "padded", "block"), BESIDE)
def test_heads_side_by_side(
    length: int, keys: int, n: int, h: int, causal: bool, padded: bool, block: kernels.Block | None
) -> None:
    q, grad = normal(2, length, n, h, count=2)
    k, v = normal(2, keys, n, h, count=2)
    block = block or kernels.block_of(n, n, length, keys, h, beside=True)
    seen = jnp.stack([jnp.arange(keys) >= 5, jnp.arange(keys) < keys - 3]) if padded else None
    agree(
        lambda *x: kernels.attention(
            *x, attention.per_key(2, keys, seen, None) if padded else None, None, None, causal, True, block
        ),
        lambda *x: attention.attend(*x, causal=causal, key_mask=seen),
        (q, k, v),
        grad,
    )


def test_heads_that_fill_no_lanes_do_not_lie_side_by_side() -> None:
    assert kernels.block_of(16, 16, 257, 257, 64, beside=True) == kernels.Block(2, 257, True)
    for heads, groups, width in ((3, 3, 64), (4, 2, 64), (4, 4, 48), (4, 4, 128)):
        assert kernels.block_of(heads, groups, 257, 257, width, beside=True) is None


@pytest.mark.parametrize(("b", "t", "p", "n", "h"), FRAMES)
def test_frames(b: int, t: int, p: int, n: int, h: int) -> None:
    def plain(*x: jax.Array) -> jax.Array:
        return attention.attend_frames(*x, n)

    *inputs, grad = normal(b, t, p, n * h, count=4)
    agree(lambda *x: kernels.over_frames(*x, n, True), plain, tuple(inputs), grad)


def test_attend_frames_is_attention_over_frames() -> None:
    q, k, v = normal(2, 4, 9, 3, 8, count=3)
    expected = jax.vmap(jax.nn.dot_product_attention, in_axes=2, out_axes=2)(q, k, v)
    flat = (x.reshape(2, 4, 9, 24) for x in (q, k, v))
    np.testing.assert_allclose(attention.attend_frames(*flat, 3), expected.reshape(2, 4, 9, 24), atol=1e-6)


@pytest.mark.parametrize("heads", [2, 3])
def test_sharded_frames(monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    """Two heads are sharded over "tensor"; three stay replicated, although D itself is divisible."""
    q, k, v = (x.astype(jnp.bfloat16) for x in normal(4, 2, 6, heads * 8, count=3))
    wanted = attention.attend_frames(*(x.astype(jnp.float32) for x in (q, k, v)), heads)
    original = kernels.over_frames
    monkeypatch.setattr(sharding, "computes_on", lambda name: name == "tpu")
    monkeypatch.setattr(kernels, "over_frames", lambda *given: original(*given, True))
    with sharding.computing(sharding.make_mesh(4, 1, 2), RULES):
        made = jax.jit(lambda *x: attention.attend_frames(*x, heads))(q, k, v)
    np.testing.assert_allclose(made.astype(jnp.float32), wanted, atol=0.03)


def test_half_precision_rounds_operands_only() -> None:
    q, k, v = (x.astype(jnp.bfloat16) for x in normal(2, 33, 4, 16, count=3))
    wanted = attention.attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    made = kernels.attention(q, k, v, interpret=True)
    assert made.dtype == jnp.bfloat16
    np.testing.assert_allclose(made.astype(jnp.float32), wanted, atol=0.02)


def test_block_of_rows_too_long_for_vmem_is_none() -> None:
    assert kernels.block_of(8, 8, 197, 197, 96) == kernels.Block(8, 197)
    assert kernels.block_of(16, 16, 2048, 2048, 128).queries < 2048
    assert kernels.block_of(6, 6, 20000, 20000, 64) is None


@pytest.mark.parametrize("groups", [4, 1])
def test_sharded_decoder_rows(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    """Slopes are sharded with their heads; a single key/value head is repeated so that query heads can be sharded."""
    original, local = kernels.attention, []

    def run(*given, block=None) -> jax.Array:
        local.append([x.shape[2] for x in given[:3]])
        return original(*given, True, block)

    monkeypatch.setattr(sharding, "computes_on", lambda name: name == "tpu")
    monkeypatch.setattr(kernels, "attention", run)
    q, k, v = (x.astype(jnp.bfloat16) for x in (*normal(4, 12, 8, 8, count=1), *normal(4, 12, groups, 8, count=2)))
    seen = jnp.arange(12) >= jnp.asarray([0, 2, 5, 0])[:, None]
    given = {"key_mask": seen, "slopes": 0.5 ** jnp.arange(1.0, 9), "key_positions": jnp.cumsum(seen, axis=1)}
    with sharding.computing(sharding.make_mesh(2, 1, 4), RULES):
        made = jax.jit(lambda *x: attention.attend(*x, causal=True, **given))(q, k, v)
    assert local == [[2, 1, 1]]
    monkeypatch.undo()
    wanted = attention.attend(*(x.astype(jnp.float32) for x in (q, k, v)), causal=True, **given)
    np.testing.assert_allclose(made.astype(jnp.float32), wanted, atol=0.03)


@pytest.mark.parametrize(("tensor", "block"), [(4, kernels.Block(2, 12, True)), (8, None)])
def test_flat_rows_are_read_side_by_side(
    monkeypatch: pytest.MonkeyPatch, tensor: int, block: kernels.Block | None
) -> None:
    """Two heads of 64 on each device fill its lanes; one alone does not."""
    original, blocks = kernels.attention, []

    def run(*given, block=None) -> jax.Array:
        blocks.append(block)
        return original(*given, True, block)

    monkeypatch.setattr(sharding, "computes_on", lambda name: name == "tpu")
    monkeypatch.setattr(kernels, "attention", run)
    q, k, v = (x.astype(jnp.bfloat16) for x in normal(2, 12, 8, 64, count=3))
    with sharding.computing(sharding.make_mesh(8 // tensor, 1, tensor), RULES), kernels.recording() as uses:
        made = jax.jit(lambda *x: attention.attend(*x, flat=True))(q, k, v)
    assert blocks == [block] and [use.beside for use in uses] == [block is not None]
    monkeypatch.undo()
    wanted = attention.attend(*(x.astype(jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(made.astype(jnp.float32), wanted, atol=0.03)


def test_no_float32_logits_of_long_rows_on_tpu() -> None:
    """GPT-3, grouped queries with padding, and the step of a packed BLOOM, compiled ahead of time for a TPU."""
    script = """
import os, re
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ymplug_jax.analysis import aot
from ymplug_jax.core import sharding
from ymplug_jax.models import attention, kernels, language_model, plain_attention
from ymplug_jax.models.bloom import Bloom
mesh = sharding.make_mesh(4, 1, 1, aot.devices_of("v5e:2x2"))
place = NamedSharding(mesh, PartitionSpec("data"))
length = 2048
def facts(n, groups, h, padding, alibi, off=()):
    slopes = 0.5 ** jnp.arange(1.0, n + 1)
    def run(q, k, v, seen, at, grad):
        given = {"key_mask": seen} if padding else {}
        given |= {"slopes": slopes, "key_positions": at} if alibi else {}
        y, back = jax.vjp(lambda *x: attention.attend(*x, causal=True, **given), q, k, v)
        return y, back(grad)
    shapes = [(n, h), (groups, h), (groups, h), (), (), (n, h)]
    types = ["bfloat16"] * 3 + ["bool", "int32", "bfloat16"]
    given = [jax.ShapeDtypeStruct((4, length, *s), t, sharding=place) for s, t in zip(shapes, types)]
    with sharding.computing(mesh, ()), kernels.without(off):
        made = jax.jit(run).lower(*given).compile()
    square = re.findall(r"\\w+\\[[\\d,]*2048,2048\\]", made.as_text())
    return made.memory_analysis().temp_size_in_bytes, "tpu_custom_call" in made.as_text(), square
for shape in ((2, 2, 64, False, False), (4, 2, 128, True, False)):
    size, fused, square = facts(*shape)
    assert fused and not square and size < 4 * 2**20, (shape, size, square)
with plain_attention.undivided():  # the comparison without the kernel
    size, fused, square = facts(2, 2, 128, False, False, ["tpu_rows"])
assert not fused and square, (size, len(square))

lm = Bloom(vocab=256, width=256, depth=2, heads=2, dtype="bfloat16", remat="dots")
params = jax.eval_shape(lambda key: language_model.init(lm, key), jax.random.key(0))
def loss(params, ids, segments):
    read = lambda lm: lm.logits(lm(lm.embed(ids), segments=segments))
    return jnp.mean(jax.nn.logsumexp(lm.apply({"params": params}, method=read), axis=-1))
with sharding.computing(mesh, ()), kernels.recording() as uses:
    rows = jax.ShapeDtypeStruct((4, length), "int32", sharding=place)
    text = jax.jit(jax.grad(loss)).lower(params, rows, rows).compile().as_text()
assert "tpu_custom_call" in text and not re.search(r"\\[[\\d,]*2048,2048\\]", text)
assert [use[:6] + use[7:] for use in uses] == [("tpu_rows", length, length, 2, 2, 128, True, False, True, True, False)]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("tensor", [1, 2])
def test_sharded_rows(tensor: int) -> None:
    """Eight devices equal one, with rows over "data" and heads over "tensor"; an indivisible batch is replicated."""
    mesh = sharding.make_mesh(8 // tensor, 1, tensor)
    for rows in (8, 3):
        q, k, v = normal(rows, 12, 4, 8, count=3)

        def run(*x: jax.Array) -> jax.Array:
            return sharding.by_device(
                lambda *a: kernels.attention(*a, causal=True, interpret=True), *x, axes=[AXES] * 3
            )

        with sharding.computing(mesh, RULES):
            out = jax.jit(run)(q, k, v)
        np.testing.assert_allclose(out, attention.attend(q, k, v, causal=True), atol=1e-5)


AXES = ("batch", None, "heads", None)
RULES = (("heads", "tensor"),)


def test_flops_of_kernels_and_of_their_parts_on_devices() -> None:
    q = jnp.zeros((8, 16, 4, 8))
    product = 2 * 8 * 4 * 16 * 16 * 8

    def run(x: jax.Array) -> jax.Array:
        return sharding.by_device(lambda a: kernels.attention(a, a, a, causal=True, interpret=True), x, axes=[AXES])

    with sharding.computing(sharding.make_mesh(4, 1, 2), RULES):
        assert flops.count(run, q) == 2 * product
        assert flops.count(jax.grad(lambda x: run(x).sum()), q) == 7 * product  # logits are computed twice
    block = kernels.Block(2, 16, True)
    q = jnp.zeros((8, 16, 4, 64))
    assert flops.count(lambda a: kernels.attention(a, a, a, interpret=True, block=block), q) == 2 * 8 * product


@pytest.mark.parametrize(
    ("maker", "change", "kernel"),
    [
        ("tpu", {}, True),
        ("tpu", {"dropout": 0.1, "key": jax.random.key(0)}, False),
        ("tpu", {"bias": jnp.zeros((1, 1, 1, 8))}, False),
        ("cpu", {}, False),
    ],
)
def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch, maker: str, change: dict, kernel: bool) -> None:
    """The kernel runs on TPU in half precision, except with dropout or a bias."""
    monkeypatch.setattr(sharding, "computes_on", lambda name: name == maker)
    q = jnp.zeros((2, 8, 2, 16), jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda q: attention.attend(q, q, q, **change))(q))
    assert ("pallas_call" in text) == kernel
    whole = q.astype(jnp.float32)
    assert "pallas_call" not in str(jax.make_jaxpr(lambda q: attention.attend(q, q, q, **change))(whole))
    frames = q.reshape(q.shape[0], 1, q.shape[1], -1)
    made = str(jax.make_jaxpr(lambda x: attention.attend_frames(x, x, x, q.shape[2]))(frames))
    assert ("pallas_call" in made) == (maker == "tpu")


def test_nvidia_uses_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def fake(q: jax.Array, k: jax.Array, v: jax.Array, **settings) -> jax.Array:
        asked.update(settings)
        return q

    monkeypatch.setattr(sharding, "computes_on", lambda name: name == "nvidia")
    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    q = jnp.zeros((2, 8, 2, 16), jnp.bfloat16)
    attention.attend(q, q, q, causal=True)
    assert asked == {"scale": 0.25, "is_causal": True, "implementation": "cudnn"}  # neither a mask nor a bias
    attention.attend(q, q, q, causal=True, segments=jnp.ones((2, 8), jnp.int32))
    assert asked == {"scale": 0.25, "is_causal": True, "implementation": "cudnn"}
    asked.clear()
    attention.attend(q[..., :3], q[..., :3], q[..., :3])  # cuDNN needs a multiple of 8
    assert not asked
