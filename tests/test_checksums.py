"""Checksums of parameters tell arrays apart by type, shape and bytes, and stand beside a checkpoint that Orbax still reads."""

import hashlib
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from ymplug_jax import checksums, exits


def test_known_values():
    """CRC-32C of RFC 3720's examples: 32 bytes of zeros, of ones, and rising."""
    assert checksums.of(np.zeros(32, np.uint8)) == "uint8[32]:8a9136aa"
    assert checksums.of(np.full((4, 8), 0xFF, np.uint8)) == "uint8[4,8]:62a8ab43"
    assert checksums.of(np.arange(32, dtype=np.uint8).view("<u4")) == "uint32[8]:46dd794e"
    assert checksums.of(np.zeros((0, 3), np.float32)) == "float32[0,3]:00000000"
    assert checksums.of(np.float32(0)) == "float32[]:48674bc7"
    assert checksums.of(np.zeros(2, ml_dtypes.bfloat16)) == "bfloat16[2]:48674bc7"


def test_type_shape_and_every_bit_count():
    value = np.arange(24, dtype=np.int32).reshape(4, 6)
    found = {checksums.of(value)}
    for other in (value.view(np.float32), value.view(np.uint32), value.reshape(6, 4), value.reshape(24), value.T):
        found.add(checksums.of(other))
    for byte in (0, 50, 95):
        changed = value.copy()
        changed.reshape(-1).view(np.uint8)[byte] ^= 1
        found.add(checksums.of(changed))
    assert len(found) == 9


def test_memory_order_does_not_count(monkeypatch: pytest.MonkeyPatch):
    value = np.random.default_rng(0).normal(size=(7, 5, 6)).astype(np.float32)
    expected = checksums.of(value)
    for block in (8, 100, 200, 2**20):
        monkeypatch.setattr(checksums, "BLOCK", block)
        assert checksums.of(np.asfortranarray(value)) == expected
        assert checksums.of(value.transpose(2, 0, 1)) == checksums.of(value.transpose(2, 0, 1).copy())
        assert checksums.of(np.repeat(value, 2, axis=0)[::2]) == expected
        assert checksums.of(np.asfortranarray(value[:1])) == checksums.of(value[:1].copy())


def test_slices_one_after_the_other_give_the_whole():
    value = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    crc = 0
    for layer in value:
        crc = checksums.extended(crc, layer)
    assert checksums.text(value.dtype, value.shape, crc) == checksums.of(value)


def test_no_second_copy_in_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checksums, "BLOCK", 2**20)
    value = np.asfortranarray(np.ones((4096, 2048), np.float32))
    tracemalloc.start()
    checksums.of(value)
    checksums.of(np.ones((1, 1), np.float32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 * 1.5


def test_beside_a_checkpoint_of_orbax(tmp_path: Path):
    """Both the managed steps and a single item are read as before; the newest step is found."""
    tree = {"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}
    sums = {"a/kernel": checksums.of(tree["a"]["kernel"])}
    with ocp.CheckpointManager(tmp_path / "steps", options=ocp.CheckpointManagerOptions(max_to_keep=1)) as manager:
        for step in (3, 7):
            manager.save(step, args=ocp.args.Composite(trainable=ocp.args.StandardSave(tree)))
            manager.wait_until_finished()
            checksums.write(epath.Path(tmp_path) / "steps" / str(step) / "trainable", sums)
    single = epath.Path(tmp_path) / "frozen"
    with ocp.StandardCheckpointer() as writer:
        writer.save(single, tree)
    checksums.write(single, sums)
    with ocp.CheckpointManager(tmp_path / "steps") as manager:
        assert manager.all_steps() == [7]
        back = manager.restore(7, args=ocp.args.Composite(trainable=ocp.args.StandardRestore(tree)))
    np.testing.assert_array_equal(back.trainable["a"]["kernel"], tree["a"]["kernel"])
    with ocp.StandardCheckpointer() as reader:
        np.testing.assert_array_equal(reader.restore(single)["a"]["kernel"], tree["a"]["kernel"])
    assert checksums.read(single) == sums == checksums.read(epath.Path(tmp_path) / "steps" / "7" / "trainable")
    assert not list(tmp_path.rglob("*.partial"))


def test_reading_and_writing(tmp_path: Path):
    folder = epath.Path(tmp_path) / "converted"
    with pytest.raises(FileNotFoundError, match="converted"):
        checksums.write(folder, {})
    folder.mkdir()
    assert checksums.read(folder) is None
    checksums.write(folder, {"b": "float32[1]:00000001", "a": "float32[1]:00000002"})
    checksums.write(folder, {"b": "float32[1]:00000003"})
    assert checksums.read(folder) == {"b": "float32[1]:00000003"}
    for damaged in (b"", b"{", b"[]", b'{"a": 1}', b"\xff\xfe"):
        (tmp_path / "converted.checksums.json").write_bytes(damaged)
        with pytest.raises(exits.Mistake, match=r"converted\.checksums\.json: damaged"):
            checksums.read(folder)


def test_fingerprint(tmp_path: Path):
    """By parameter, not by folder: what is frozen in one run may be trained in another."""
    a, b, c = (epath.Path(tmp_path) / name for name in "abc")
    for folder in (a, b, c):
        folder.mkdir()
    checksums.write(a, {"x": "1", "z": "3"})
    checksums.write(b, {"y": "2"})
    assert checksums.fingerprint([a, b]) == hashlib.sha256(b"x 1\ny 2\nz 3\n").hexdigest()
    assert checksums.fingerprint([a, b]) == checksums.fingerprint([b, a])
    assert checksums.fingerprint([a, b, c]) is None
    checksums.write(c, {"x": "1", "y": "2", "z": "3"})
    assert checksums.fingerprint([c]) == checksums.fingerprint([a, b])
    checksums.write(c, {"x": "1", "y": "4", "z": "3"})
    assert checksums.fingerprint([c]) != checksums.fingerprint([a, b])
