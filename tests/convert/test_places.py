"""Failing disks, damaged checkpoints and wrong flags end in one line and the right exit code, and leave no partial files."""

import builtins
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from etils import epath

import trees
import ymplug_jax.convert
from benchmarks import torch_sources
from ymplug_jax.convert import __main__ as command
from ymplug_jax.convert import leaves, to_orbax
from ymplug_jax.core import leaf_checksums

HEADS = ("--heads", "llm=4")
SIZES = {"width": 96, "depth": 3, "vocab": 101, "positions": 40}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (file,) = torch_sources.megatron(tmp_path_factory.mktemp("gpt3"), dtype=torch.float16, **SIZES)
    return file


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out"
    assert command.main(["--model", "gpt3", "--source", str(source), "--out", str(out), *HEADS]) == 0
    return out


def line_of(capsys: pytest.CaptureFixture) -> str:
    """The one error line, without the table and the progress bar."""
    (line,) = [text for text in capsys.readouterr().err.split("\n") if text.startswith("error: ")]
    return line


def convert(source: Path, out: Path, *more: str, code: int = 0) -> None:
    assert command.main(["--model", "gpt3", "--source", str(source), "--out", str(out), *HEADS, *more]) == code


def test_every_parameter_has_its_checksum(converted: Path, source: Path) -> None:
    """Each checksum is recomputed from the stored bytes, and one from the source."""
    folder = epath.Path(converted) / "checkpoints" / "converted"
    sums = leaf_checksums.read(folder)
    assert sums.keys() == trees.stored_params(str(converted)).keys() and len(sums) == 20
    for path, leaf in leaves.opened(folder).items():
        assert sums[path] == leaf_checksums.of(leaf.read().result()), path
    weights = torch.load(source, weights_only=True)["module"]
    embed = weights["language_model.embedding.word_embeddings.weight"].numpy()
    assert sums["llm/token_embed"] == leaf_checksums.of(embed) and sums["llm/token_embed"].startswith(
        "float16[101,96]+"
    )
    assert not list((converted / "checkpoints").glob("*partial*"))


def test_a_resumed_conversion_has_all_checksums(
    source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = to_orbax.Store.write, 0

    def killed(*args) -> None:
        nonlocal count
        count += 1
        if count == 31:  # between two layers of one parameter
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(to_orbax.Store, "write", killed)
    convert(source, tmp_path / "out", code=130)
    journal = tmp_path / "out" / "checkpoints" / "converted.partial" / "converted.jsonl"
    with journal.open("a") as file:
        file.write('{"tensor": "cut o')  # a kill cuts a line short
    monkeypatch.setattr(to_orbax.Store, "write", real)
    convert(source, tmp_path / "out")
    whole, again = (epath.Path(out) / "checkpoints" / "converted" for out in (converted, tmp_path / "out"))
    assert leaf_checksums.read(again) == leaf_checksums.read(whole)
    leaves.verified(tmp_path / "out")


def test_damage_is_found(converted: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = shutil.copytree(converted, tmp_path / "run") / "checkpoints" / "converted"
    chunk = folder / "llm.blocks.mlp.up.kernel" / "1.0.0"
    data = chunk.read_bytes()
    back = ("--model", "gpt3", "--source", str(tmp_path / "run"), "--out", str(tmp_path / "back"), "--to", "torch")
    for damaged, message in (
        (data[:1000] + bytes(64) + data[1064:], "llm/blocks/mlp/up/kernel is damaged, its checksum is wrong; convert"),
        (data[:-2], "llm/blocks/mlp/up/kernel cannot be read"),
        (None, "llm/blocks/mlp/up/kernel is damaged, its checksum is wrong"),
    ):
        chunk.unlink() if damaged is None else chunk.write_bytes(damaged)
        assert command.main(list(back)) == 2
        assert message in line_of(capsys) and not (tmp_path / "back").exists()
    convert(source, tmp_path / "run", "--check", code=2)
    assert "llm/blocks/mlp/up/kernel is damaged, its checksum is wrong" in line_of(capsys)
    chunk.write_bytes(data)
    sums = folder.with_name("converted.checksums.json")
    sums.write_text(json.dumps({"llm/token_embed": "float16[101,96]+0000000000000000"}))
    assert command.main(list(back)) == 2
    assert "converted: parameters and checksums do not match (llm/blocks/" in line_of(capsys)
    sums.unlink()
    assert command.main(list(back)) == 0, "older versions wrote no checksums"


def test_a_place_that_cannot_be_made(
    source: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "file"
    file.touch()
    convert(source, file / "x", code=2)
    assert line_of(capsys) == f"error: --out {file}/x: cannot be written (Not a directory); choose another folder"
    convert(source, file, code=2)
    assert line_of(capsys) == f"error: --out {file}: cannot be written (Not a directory); choose another folder"
    back = ["--model", "gpt3", "--source", str(converted), "--to", "torch", "--out"]
    assert command.main([*back, str(file / "x")]) == 2
    assert line_of(capsys) == f"error: --out {file}/x: cannot be written (Not a directory); choose another folder"
    assert file.read_bytes() == b""


def test_too_little_room_is_found_before_anything_is_written(
    source: Path, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=600_000))
    convert(source, tmp_path / "out", code=2)
    assert "bytes, but only 600,000 are free; free some space or choose another folder" in line_of(capsys)
    assert not (tmp_path / "out").exists()
    back = ["--model", "gpt3", "--source", str(converted), "--to", "torch", "--out", str(tmp_path / "back")]
    assert command.main(back) == 2 and "only 600,000 are free" in line_of(capsys)
    assert not list(tmp_path.rglob("*.safetensors*"))


def test_a_disk_that_fails_on_the_way(
    source: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A limit on file sizes makes the system fail writes as a full disk does, in TensorStore and in Python."""
    back = ["--model", "gpt3", "--source", str(converted), "--to", "torch", "--out", str(tmp_path / "back")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        convert(source, tmp_path / "out", code=5)
        first = line_of(capsys)
        assert command.main(back) == 5
        second = line_of(capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert first == (
        f"error: {tmp_path}/out/checkpoints/converted.partial: cannot be written (File too large); free some space or repair the "
        "disk, then run the same command again to continue"
    )
    assert second.startswith(f"error: {tmp_path}/back/model.safetensors: cannot be written (File too large); free some")
    assert not (tmp_path / "back").exists()
    convert(source, tmp_path / "out")
    assert leaf_checksums.read(epath.Path(tmp_path) / "out/checkpoints/converted") == leaf_checksums.read(
        epath.Path(converted) / "checkpoints/converted"
    )


def test_a_source_that_proves_bad_leaves_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tensors = torch.load(source, weights_only=True)["module"]
    tensors["language_model.encoder.final_layernorm.bias"][3] = float("nan")
    torch.save(tensors, tmp_path / "x.pt")
    (tmp_path / "kept").mkdir()
    for out in (tmp_path / "new" / "deep", tmp_path / "kept"):
        convert(tmp_path / "x.pt", out, code=2)
        assert "language_model.encoder.final_layernorm.bias has values that are not finite" in line_of(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "x.pt"]
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_layer_cannot_be_missing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """--allow_missing does not apply: the missing layer would be zeros among trained layers."""
    tensors = torch.load(source, weights_only=True)["module"]
    del tensors["language_model.encoder.layers.1.mlp.dense_4h_to_h.bias"]
    torch.save(tensors, tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "out", "--allow_missing", ".*", code=2)
    assert "dense_4h_to_h.bias (other layers of this parameter are present)" in line_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model bloomz", "argument --model: invalid choice: 'bloomz'"),
        ("--modle bloom", "unrecognized arguments: --modle bloom"),
        ("--out gs:/bucket/x", "gs:/bucket/x: not a place; write gs://bucket/x"),
        ("--out hdfs://bucket/x", "hdfs://bucket/x: hdfs:// is not supported; give a local path"),
        ("--weights x.pt", "unrecognized arguments: --weights x.pt"),
        (
            "--heads 32",
            "--heads 32: not NAME=NUMBER; choose one of llm, vision, text, abstractor, fusion, universal, e.g. llm=32",
        ),
        ("--heads llm=", "--heads llm=: not NAME=NUMBER; choose"),
        ("--heads llm=x", "--heads llm=x: not NAME=NUMBER"),
        ("--heads llm=0", "--heads llm=0: not NAME=NUMBER"),
        ("--heads llm=-4", "--heads llm=-4: not NAME=NUMBER"),
        ("--heads lm=4", "--heads lm=4: not NAME=NUMBER"),
        ("--dtype bfloat16", "--dtype bfloat16: not SUBTREE=TYPE; choose one of float32, bfloat16, float16"),
        ("--dtype llm=int8", "--dtype llm=int8: not SUBTREE=TYPE"),
        ("--image_size 0", "argument --image_size: '0' is not a whole number above 0"),
        ("--frames 1.5", "argument --frames: '1.5' is not a whole number"),
        ("--allow_missing (", "argument --allow_missing: '(' is not a regular expression"),
        ("--keep_lora", "--keep_lora: there is no adapter to keep; give its folder with --lora DIR"),
        ("--layout openai", "--layout openai: applies to --to torch only, a source's layout is detected; leave it out"),
        ("--check --frames 8", "--check: compares unchanged models only; leave out --image_size"),
        ("--to torch --check", "--check: does not apply to --to torch; leave it out"),
        ("--to torch --source a b", "--source: --to torch takes one folder; give"),
        ("--to onnx", "argument --to: invalid choice: 'onnx'"),
    ],
)
def test_mistakes_in_flags(argv: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = ["--model", "gpt3", "--source", "x.pt", "--out", str(tmp_path / "out"), *argv.split()]
    try:
        code = command.main(given)
    except SystemExit as ended:
        code = ended.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and line.startswith("error: ") and message in line
    assert list(tmp_path.iterdir()) == []


def test_folders_without_a_checkpoint(tmp_path: Path, converted: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    out = ["--to", "torch", "--out", str(tmp_path / "out")]
    damaged = shutil.copytree(converted, tmp_path / "damaged")
    (damaged / "checkpoints" / "converted" / "_METADATA").write_text("{")
    record = shutil.copytree(converted, tmp_path / "record")
    (record / "conversion.json").write_text("{")
    for name, message in (
        ("gone", "gone: no such folder; give the --workdir of a run or the --out of a conversion"),
        ("file", "file: a file, not a folder; give the --workdir of a run"),
        ("empty", "empty: no checkpoint here; give the --workdir of a run or the --out of a conversion"),
        ("damaged", "converted: its parameters cannot be opened ("),
        ("record", "conversion.json: not JSON ("),
    ):
        assert command.main(["--model", "gpt3", "--source", str(tmp_path / name), *out]) == 2
        assert message in line_of(capsys)
    assert command.main(["--model", "bert", "--source", str(converted), *out]) == 2
    assert "no parameter belongs to model bert; give the right --model" in line_of(capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "fix"), [("torch", "'ymplug_jax[convert]'"), ("safetensors", "'ymplug_jax[convert]'")]
)
def test_a_missing_extra_is_named(
    name: str, fix: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for module in [m for m in sys.modules if m.startswith("ymplug_jax.convert.") and not m.endswith("__main__")]:
        monkeypatch.delitem(sys.modules, module)
    real = builtins.__import__

    def without(module: str, *args, **kwargs):
        if module.partition(".")[0] == name:
            raise ModuleNotFoundError(f"No module named '{module}'", name=module)
        return real(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    convert(source, tmp_path / "out", code=2)
    assert line_of(capsys).endswith(f"is not installed; pip install {fix}")
    assert not (tmp_path / "out").exists()


def test_check_names_what_it_needs_before_it_converts(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for module in ("ymplug_jax.convert.check", "ymplug_jax.convert.oracles"):
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.delattr(ymplug_jax.convert, module.rpartition(".")[2], raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)
    convert(source, tmp_path / "out", "--check", code=2)
    assert line_of(capsys) == "error: --check: transformers is not installed; pip install transformers"
    assert not (tmp_path / "out").exists()


def test_the_flags_are_read_without_torch() -> None:
    """A wrong flag is reported without waiting for torch to load."""
    code = "import sys, ymplug_jax.convert.__main__; print([m for m in ('torch', 'safetensors') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
