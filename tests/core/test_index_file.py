"""Video indices on disk: atomic writes, one-line errors, and the check of their origin."""

import types
from pathlib import Path

import numpy as np
import pytest

from ymplug_jax.core import checkpoint_files, config, index_file
from ymplug_jax.core.exits import Mistake
from ymplug_jax.tasks.alpro import pretrain


def test_index_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "index"
    index_file.write(path, {"video": np.ones((2, 3), np.float32)})
    assert [p.name for p in tmp_path.iterdir()] == ["index"]

    def fail(file: object, **arrays: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="No space left"):
        index_file.write(path, {"video": np.zeros((2, 3), np.float32)})
    assert [p.name for p in tmp_path.iterdir()] == ["index"]
    assert index_file.read(path, ("video",), setting="--index")["video"].tolist() == [[1, 1, 1], [1, 1, 1]]


@pytest.mark.parametrize(
    "content", [b"", b"text\n" * 99, b"PK\x03\x04" + b"\0" * 99, np.lib.format.MAGIC_PREFIX + b"\x01\0", "npy", "npz"]
)
def test_invalid_index_gives_a_one_line_error(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "index.npz"
    if content == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros((2, 3)))
    elif content == "npz":
        np.savez(path, video=np.ones((50, 30)))
        data = bytearray(path.read_bytes())
        data[6000] ^= 1  # a bit inside the stored values
        path.write_bytes(data)
    else:
        path.write_bytes(content)
    with pytest.raises(Mistake, match=r"--index .*index.npz: cannot be read as an index") as caught:
        index_file.read(path, ("video",), setting="--index")
    assert "\n" not in str(caught.value)


def test_entities_of_another_prompter_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, weights in (("mine", "a" * 64), ("other", "b" * 64)):
        (tmp_path / folder / "checkpoints" / "converted").mkdir(parents=True)
        (tmp_path / folder / "weights").write_text(weights)
    monkeypatch.setattr(checkpoint_files, "fingerprint", lambda folder: (Path(folder) / "weights").read_text())
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    model = types.SimpleNamespace(entities=3, contrastive_width=2, stills=False)

    def load(prompter: str, **more: object) -> np.ndarray:
        np.savez(tmp_path / "index.npz", entity_features=table, **more)
        train = config.Train(init_from=f"prompter:={tmp_path / prompter}")
        settings = config.Experiment("alpro_pretrain", {}, train=train)
        return pretrain.teacher_entities(settings, str(tmp_path / "index.npz"), model)["entities"]

    origin = {"fingerprint": "a" * 64, "step": 5, "task": "alpro_prompter", "frames": 4}
    np.testing.assert_array_equal(load("mine", **origin), table)
    with pytest.raises(Mistake, match=r"weights aaaaaaaaaaaa, but .*other.* is weights bbbbbbbbbbbb"):
        load("other", **origin)
    with pytest.raises(Mistake, match="does not record which run computed it"):
        load("mine")
