"""Files that are not weights: each is refused in one line with the fix, without running or writing anything."""

import gzip
import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ymplug_jax.convert import __main__ as command
from ymplug_jax.convert import lora
from ymplug_jax.convert.torch_file import Source
from ymplug_jax.core import exits

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3000000000\n"
NAMES = ["pytorch_model.bin", "model.safetensors", "mp_rank_00_model_states.pt"]


def refused(path: Path, *messages: str) -> None:
    with pytest.raises(exits.Mistake) as caught:
        Source([path])
    text = str(caught.value)
    assert all(message in text for message in messages), text
    assert "\n" not in text and "weights_only" not in text and "add_safe_globals" not in text and len(text) < 500


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            POINTER,
            "a Git LFS pointer, not the file itself (3,000,000,000 bytes); run `git lfs install && git lfs pull`",
        ),
        (b"", "empty; download it again"),
        (b"<!DOCTYPE html><html><head><title>Sign in</title>", "a web page (HTML or XML), not the file itself"),
        (b"\xef\xbb\xbf\r\n<html>\r\n", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "a web page"),
        (b'{"error": "Repository not found"}', 'text, not weights (\'{"error": "Repository not found"}\')'),
        ("请求失败\n".encode(), "text, not weights ('请求失败')"),
        (gzip.compress(b"x" * 100, mtime=0), "a gzip archive; unpack it"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file of Keras or TensorFlow"),
        (b"GGUF" + bytes(100), "a GGUF file"),
        (bytes(5000), "begins with zeros"),
        (random.Random(0).randbytes(64).replace(b"{", b"x"), "not a file of "),
        (b"\xff" * 8 + b"{" + b"x" * 50, "not a file of "),
    ],
)
def test_stand_ins_are_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, f"{name}: {message}")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    refused(tmp_path / "gone.pt", "gone.pt: no such file")
    (tmp_path / "x.safetensors").symlink_to("../../blobs/0123")
    refused(tmp_path / "x.safetensors", "broken link to ../../blobs/0123; download it again")
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", "not a regular file")


class Custom:
    """A class that only the program that wrote the file knows."""


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("zipped", [True, False])
def test_what_is_asked_for_is_said_and_nothing_runs(tmp_path: Path, zipped: bool) -> None:
    marker = tmp_path / "it_ran"
    file = tmp_path / "x.bin"
    for value, asked in (
        (Evil(marker), f"{os.system.__module__}.system"),
        (Custom(), f"{Custom.__module__}.Custom"),
        (np.zeros(3), "numpy."),
        (Path("x"), "Path"),
    ):
        torch.save({"a": torch.zeros(1), "more": value}, file, _use_new_zipfile_serialization=zipped)
        refused(
            file, "holds more than tensors (its pickle refers to ", asked, "save only its state dict, or as safetensors"
        )
    for protocol in (0, 2, 4):
        file.write_bytes(pickle.dumps({"evil": Evil(marker)}, protocol))
        refused(file, "x.bin: ")
    assert not marker.exists()


def test_damaged_archives(tmp_path: Path) -> None:
    """A file that is truncated or overwritten anywhere ends in one line, when opened or when read."""
    value = torch.arange(500, dtype=torch.float32)
    for name in ("x.pt", "x.safetensors", "old.pt"):
        file = tmp_path / name
        if name == "x.safetensors":
            save_file({"a": value}, file)
        else:
            torch.save({"a": value}, file, _use_new_zipfile_serialization=name == "x.pt")
        data = file.read_bytes()
        rng = np.random.default_rng(0)
        for trial in range(60):
            at = int(rng.integers(len(data)))
            damaged = data[:at] if trial % 2 else data[:at] + rng.bytes(16) + data[at + 16 :]
            file.write_bytes(damaged)
            said = ""  # some damage has no effect
            try:
                source = Source([file])
                for tensor in source.shapes():
                    source.read(tensor)
            except exits.Mistake as error:
                said = str(error)
            assert "\n" not in said and "weights_only" not in said


def test_other_zip_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("model.safetensors", b"123")
    refused(tmp_path / "x.bin", "a zip archive that torch.save did not write; unpack it")


def test_the_content_decides_not_the_suffix(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.bin")
    torch.save({"a": torch.ones(2)}, tmp_path / "y.safetensors")
    for name in ("x.bin", "y.safetensors"):
        np.testing.assert_array_equal(Source([tmp_path / name]).read("a"), [1, 1])


def files(folder: Path, *names: str) -> Path:
    """A folder with weight files, whose tensors have the file's name, and other files."""
    for i, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            save_file({f"tensor of {name}": torch.ones(1)}, file)
        elif file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            torch.save({f"tensor of {name}": torch.ones(1)}, file)
        else:
            file.write_text(f"{i}", encoding="utf-8")
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model.safetensors", "config.json", "tokenizer.json"], ["model.safetensors"]),
        (["pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state_0.pth"], ["pytorch_model.bin"]),
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5"], ["model.safetensors"]),
        (["model.safetensors", "adapter_model.safetensors"], ["model.safetensors"]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["model_00001-of-00002.safetensors", "model_00002-of-00002.safetensors"], None),
        (["README.md", "model/ViT.pt"], ["model/ViT.pt"]),
        (["blobs/0123", "snapshots/abc/model.safetensors"], ["snapshots/abc/model.safetensors"]),
    ],
)
def test_the_weights_of_a_folder(tmp_path: Path, names: list[str], taken: list[str] | None) -> None:
    folder = files(tmp_path / "x", *names)
    source = Source([folder])
    assert list(source.shapes()) == [f"tensor of {name}" for name in taken or names]
    assert source.notes == [f"{folder}: using {', '.join(taken or names)}"]


def test_an_index_in_a_folder(tmp_path: Path) -> None:
    folder = files(tmp_path, "a-1-of-2.safetensors", "a-2-of-2.safetensors", "pytorch_model.bin")
    where = {f"tensor of a-{i}-of-2.safetensors": f"a-{i}-of-2.safetensors" for i in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert list(Source([folder]).shapes()) == list(where)


@pytest.mark.parametrize(
    ("names", "messages"),
    [
        ([], ["has no weights (it is empty)"]),
        (
            ["tf_model.h5", "config.json"],
            ["has no weights (config.json, tf_model.h5); give a file (.safetensors, .bin, .pt, .pth, .ckpt)"],
        ),
        (["a.pt", "b.pt"], ["holds several weight files; give one: --source ", "a.pt or ", "b.pt"]),
        (["model.safetensors", "ema.pt"], ["holds several weight files"]),
        (["step1/a.pt", "step2/a.pt"], ["holds several models; give one: --source ", "step1 or ", "step2"]),
        (
            ["checkpoints/converted/_METADATA"],
            ["holds a checkpoint of ymplug_jax; add --to torch to convert it back"],
        ),
    ],
)
def test_a_folder_in_which_the_weights_are_not_clear(tmp_path: Path, names: list[str], messages: list[str]) -> None:
    refused(files(tmp_path / "x", *names), *messages)


def test_pieces_in_a_folder(tmp_path: Path) -> None:
    from ymplug_jax.convert.mplug_video import MERGE

    name = "language_model.embedding.word_embeddings.weight"
    for layout in (
        "flat/mp_rank_{}_model_states.pt",
        "megatron/mp_rank_{}/model_optim_rng.pt",
        "hub/model/mp_rank_{}.pt",
    ):
        for rank in (1, 0, 10, 2, 3, 4, 5, 6, 7, 8, 9):
            file = tmp_path / layout.format(f"{rank:02d}")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"module": {name: torch.full((1, 2), float(rank))}}, file)
        source = Source([tmp_path / layout.split("/")[0]], MERGE)
        assert source.read(name)[:, 0].tolist() == list(range(11))


def test_settings_of_an_adapter(tmp_path: Path) -> None:
    settings = tmp_path / "adapter_config.json"
    for data, message in (
        (POINTER, "a Git LFS pointer"),
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"[1]", "not the settings of an adapter"),
        (b'{"peft_type": "LORA", "r": 0, "lora_alpha": 1}', "r and lora_alpha are not numbers above 0"),
        (b"\xef\xbb\xbf" + b'{"peft_type": "PREFIX_TUNING"}', "only plain LoRA is supported"),
    ):
        settings.write_bytes(data)
        with pytest.raises(exits.Mistake, match=rf"adapter_config\.json: {message}"):
            lora.read(tmp_path, ())
    settings.write_bytes(b'{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    save_file({"x.lora_A.weight": torch.ones(1, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(exits.Mistake, match=r"other tensors than pairs of lora_A and lora_B \(x\.lora_B\.weight\)"):
        lora.read(tmp_path, ())


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(POINTER)
    argv = ["--model", "bloom", "--source", str(tmp_path / "pytorch_model.bin"), "--out", str(tmp_path / "out")]
    assert command.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith(f"error: {tmp_path}/pytorch_model.bin: a Git LFS pointer") and not (tmp_path / "out").exists()
    )


def test_a_hostile_archive_cannot_lead_outside_its_bytes(tmp_path: Path) -> None:
    """The archive states strides and offsets itself; negative ones would read memory before the buffer."""
    from benchmarks import torch_sources

    torch_sources.scripted({"a.b": torch.arange(6, dtype=torch.float32).reshape(2, 3)}, tmp_path / "x.pt")
    np.testing.assert_array_equal(Source([tmp_path / "x.pt"]).read("a.b"), [[0, 1, 2], [3, 4, 5]])
    shape = b"K\x02K\x03t"  # the end of the tuple (2, 3)
    for other in (
        b"J\xfe\xff\xff\xffK\x03t",  # (-2, 3)
        b"K\x02J\xff\xff\xff\xfft",  # (2, -1)
        b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft",  # (2**31 - 1, 2**31 - 1)
        b"X\x01\x00\x00\x00xK\x03t",  # ("x", 3)
    ):
        with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
            for name in old.namelist():
                data = old.read(name)
                assert not name.endswith("/data.pkl") or shape in data
                new.writestr(name, data.replace(shape, other) if name.endswith("/data.pkl") else data)
        with pytest.raises(exits.Mistake, match=r"y\.pt: .*damaged"):
            Source([tmp_path / "y.pt"]).read("a.b")
