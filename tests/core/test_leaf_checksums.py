"""Checksums of leaves agree with a computation in Python integers under every sharding."""

import tracemalloc
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ymplug_jax.core import exits, leaf_checksums


def by_hand(words: dict[tuple[int, ...], int]) -> str:
    """Compute the sixteen digits of {index: bits} with Python integers."""
    full, one, two = 2**32 - 1, 0, 0
    for index, bits in words.items():
        place = 0
        for i in index:
            place = ((place ^ i) * 2654435761) & full
            place ^= place >> 15
        x = bits ^ place
        x = ((x ^ (x >> 16)) * 2246822507) & full
        x = ((x ^ (x >> 13)) * 3266489909) & full
        x ^= x >> 16
        y = (x * 668265263) & full
        one, two = (one + x) & full, (two + (y ^ (y >> 15))) & full
    return f"{one:08x}{two:08x}"


def test_values_of_small_arrays():
    assert leaf_checksums.of(np.array([[1.0, -2.0]], np.float32)) == "float32[1,2]+" + by_hand(
        {(0, 0): 0x3F800000, (0, 1): 0xC0000000}
    )
    assert leaf_checksums.of(np.array([1.0], ml_dtypes.bfloat16)) == "bfloat16[1]+" + by_hand({(0,): 0x3F80})
    assert leaf_checksums.of(np.int32(-1)) == "int32[]+" + by_hand({(): 0xFFFFFFFF})
    assert leaf_checksums.of(np.array([True, False])) == "bool[2]+" + by_hand({(0,): 1, (1,): 0})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_checksum_is_independent_of_the_sharding(dtype: str, monkeypatch: pytest.MonkeyPatch):
    value = np.random.default_rng(0).normal(size=(8, 4, 6)).astype(dtype)
    want = leaf_checksums.of(value)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    for small in (0, leaf_checksums.SMALL):
        monkeypatch.setattr(leaf_checksums, "SMALL", small)
        for spec in ((), ("a",), (None, "b"), ("a", None, "b")):
            assert leaf_checksums.of(jax.device_put(value, NamedSharding(mesh, PartitionSpec(*spec)))) == want
    monkeypatch.setattr(leaf_checksums, "BLOCK", 24)
    assert leaf_checksums.of(value) == want
    parts = leaf_checksums.part(value[:3], (0, 0, 0)) + leaf_checksums.part(value[3:], (3, 0, 0))
    assert leaf_checksums.text(value.dtype, value.shape, parts) == want


def test_one_bit_or_two_swapped_elements_change_it():
    value = np.arange(4096, dtype=np.float32).reshape(64, 64)
    seen = {leaf_checksums.of(value), leaf_checksums.of(value.reshape(4096)), leaf_checksums.of(value.T)}
    for i in range(0, 4096, 97):
        other = value.copy()
        other.reshape(-1).view(np.uint32)[i] ^= 1 << (i % 32)
        seen.add(leaf_checksums.of(other))
    swapped = value.copy()
    swapped[3, [5, 6]] = swapped[3, [6, 5]]
    assert len(seen | {leaf_checksums.of(swapped)}) == 3 + 43 + 1


def test_arrays_that_are_not_contiguous(monkeypatch: pytest.MonkeyPatch):
    value = np.random.default_rng(1).integers(0, 2**32, (5, 6, 7), dtype=np.uint32)
    words = {index: int(bits) for index, bits in np.ndenumerate(value)}
    turned = {(k, i, j): bits for (i, j, k), bits in words.items()}
    for block in (1, 10, 100, leaf_checksums.BLOCK):
        monkeypatch.setattr(leaf_checksums, "BLOCK", block)
        assert leaf_checksums.of(np.asfortranarray(value)) == "uint32[5,6,7]+" + by_hand(words)
        assert leaf_checksums.of(np.repeat(value, 2, axis=1)[:, ::2]) == "uint32[5,6,7]+" + by_hand(words)
        assert leaf_checksums.of(value.transpose(2, 0, 1)) == "uint32[7,5,6]+" + by_hand(turned)
        assert leaf_checksums.of(value[::-1][::-1]) == "uint32[5,6,7]+" + by_hand(words)
    layer = {(3, *index): int(bits) for index, bits in np.ndenumerate(value[3])}
    assert leaf_checksums.text("uint32", (6, 7), leaf_checksums.part(value[3][None], (3, 0, 0)))[-16:] == by_hand(layer)
    assert leaf_checksums.of(np.zeros((0, 3), np.float32)) == "float32[0,3]+" + by_hand({})


def test_memory_does_not_grow_with_the_array():
    value = np.ones((4096, 1024), np.float16).T
    tracemalloc.start()
    leaf_checksums.of(value)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 2**20 < value.nbytes


def test_the_file_beside_a_folder(tmp_path: Path):
    folder = epath.Path(tmp_path) / "converted"
    folder.mkdir()
    assert leaf_checksums.read(folder) is None
    leaf_checksums.write(folder, {"b": "float32[1]+01", "a": "float32[1]+02"})
    leaf_checksums.write(folder, {"b": "float32[1]+03"})
    assert leaf_checksums.read(folder) == {"b": "float32[1]+03"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "converted.checksums.json"]
    for damaged in (b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe"):
        (tmp_path / "converted.checksums.json").write_bytes(damaged)
        with pytest.raises(exits.Mistake, match=r"converted\.checksums\.json: damaged"):
            leaf_checksums.read(folder)
