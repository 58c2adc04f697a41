"""mPLUG-2's checkpoints of both variants: recognised, exact round trips, and outputs equal to those of plain torch."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import trees
from benchmarks import torch_sources
from ymplug_jax.convert import __main__ as command
from ymplug_jax.convert import mplug2 as tables
from ymplug_jax.core import state
from ymplug_jax.models import mplug2

GOLDEN = Path(__file__).parents[1] / "golden" / "mplug2"
# Names that stay behind, by file: everything else comes back bit by bit.
CLIP = r"visual_encoder\.((positional_embedding|text_projection|logit_scale)|(token_embedding|ln_final|transformer)\..*|visual\.proj)"
COMMON = r".*position_ids|fusion_encoder\.(bert\.)?embeddings\..*|fusion_encoder\.(bert\.)?encoder\.layer\.[01]\..*"
DEAD = {
    "vqa.npz": rf"{CLIP}|{COMMON}|.*_vision\..*|text_decoder\..*latents",
    "cls.npz": rf"{COMMON}|fusion_encoder\.cls\..*",
}


def tensors(file: str) -> tuple[dict[str, torch.Tensor], dict]:
    """The state dict of a golden file, and its settings."""
    with np.load(GOLDEN / file) as arrays:
        named = {
            name.removeprefix("param/"): torch.from_numpy(arrays[name]) for name in arrays if name.startswith("param/")
        }
        return named, json.loads(str(arrays["config"]))


@pytest.mark.parametrize("file", DEAD)
def test_there_agrees_and_back_is_equal(file: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, config = tensors(file)
    live = config["bert_config"]["fusion_layers"]
    first = config["bert_config"]["num_hidden_layers"] - live
    vision = config["tiny_clip"]["heads"] if "tiny_clip" in config else config["visual_cfg"]["num_heads"]
    torch.save({"model": source}, tmp_path / "x.pt")
    argv = ["--model", "mplug2", "--source", str(tmp_path / "x.pt"), "--out", str(tmp_path / "orbax"), "--check"]
    assert command.main([*argv, "--heads", "text=4", f"vision={vision}", f"fusion={live}"]) == 0
    assert "modules against PyTorch" in capsys.readouterr().out
    back = ["--model", "mplug2", "--source", str(tmp_path / "orbax"), "--out", str(tmp_path / "back"), "--to", "torch"]
    assert command.main(back) == 0
    found = load_file(tmp_path / "back" / "model.safetensors")
    pattern = DEAD[file].replace("[01]", f"[0-{first - 1}]")
    assert {name for name in source if re.fullmatch(pattern, name)} == source.keys() - found.keys()
    for name, value in found.items():
        assert torch.equal(value, source[name]), name


def test_a_size_that_is_not_released_needs_the_number_of_fusion_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save({"model": tensors("cls.npz")[0]}, tmp_path / "x.pt")
    argv = [
        "--model",
        "mplug2",
        "--source",
        str(tmp_path / "x.pt"),
        "--out",
        str(tmp_path / "orbax"),
        "--heads",
        "text=4",
    ]
    assert command.main([*argv, "vision=4"]) == 2
    assert "give --heads fusion=N" in capsys.readouterr().err
    assert command.main([*argv, "vision=4", "fusion=9"]) == 2
    assert "has 3 fusion layers, so 9 cannot be in use" in capsys.readouterr().err


def test_forms_have_names() -> None:
    for name, form in tables.KNOWN.items():
        assert tables.name_of(form) == name and tables.form_named(name) == form
    other = tables.Form("mplug_youku", 3, 0, 5, 2, 2, True)
    assert tables.form_named(tables.name_of(other)) == other and "mplug_youku" in tables.name_of(other)
    with pytest.raises(KeyError):
        tables.form_named("mplug2:1:2")


def test_released_files_are_recognised() -> None:
    """Large: 24 text layers, of which 2 are universal, and the last 6 of 24 fusion layers; 16 heads everywhere."""
    source, _ = tensors("vqa.npz")
    shapes = {}
    for name, value in source.items():
        match = re.match(r"(text_encoder|fusion_encoder|text_decoder\.bert)\.encoder\.layer\.(\d+)\.(.*)", name)
        shape = tuple(1024 if size == 32 else size for size in value.shape)
        if not match:
            shapes[name] = shape
        elif match[1] == "text_encoder":
            last = {"0": range(22), "1": [22], "2": [23]}[match[2]]
            shapes |= {f"text_encoder.encoder.layer.{i}.{match[3]}": shape for i in last}
        elif match[2] == "0":
            count = 24 if match[1] == "fusion_encoder" else 12
            shapes |= {f"{match[1]}.encoder.layer.{i}.{match[3]}": shape for i in range(count)}
    found = tables.plan(shapes, {})
    assert found.layout == "mplug2_large"
    model = found.model
    assert (model.text.depth, model.universal.depth, model.fusion.depth, model.decoder.depth) == (22, 2, 6, 12)
    assert {part.heads for part in (model.vision, model.text, model.universal, model.fusion, model.decoder)} == {16}


def bert_file(depth: int) -> dict[str, torch.Tensor]:
    """The names and shapes of a small BERT with its head, random values."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12,
    )  # fmt: skip
    torch.manual_seed(0)
    named = transformers.BertForMaskedLM(config).state_dict()
    return {name: torch.randn_like(value) / 4 if value.is_floating_point() else value for name, value in named.items()}


@pytest.mark.parametrize(
    ("flags", "layers"), [(["fusion=2"], (2, 0, 2, 4)), (["fusion=1", "universal=2"], (2, 2, 1, 4))]
)
def test_a_bert_starts_all_parts(
    flags: list[str], layers: tuple, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = bert_file(4)
    words = source["bert.embeddings.word_embeddings.weight"]
    source |= {"cls.predictions.decoder.weight": words, "cls.predictions.decoder.bias": source["cls.predictions.bias"]}
    torch.save(source, tmp_path / "pytorch_model.bin")
    argv = ["--model", "bert_mplug2", "--source", str(tmp_path / "pytorch_model.bin"), "--out", str(tmp_path / "jax")]
    assert command.main([*argv, "--check", "--heads", "text=2", *flags]) == 0
    assert "modules against PyTorch" in capsys.readouterr().out
    stored = trees.stored_params(str(tmp_path / "jax"))
    stacks = ("text/blocks", "universal/blocks", "fusion/blocks", "decoder/blocks")
    found = tuple(stored[f"{s}/mlp/up/bias"].shape[0] if f"{s}/mlp/up/bias" in stored else 0 for s in stacks)
    assert found == layers and {"mlm/token_embed", "decoder/head/bias"} <= set(stored)
    assert not any("cross" in path or "latents" in path for path in stored)
    back = ["--model", "bert_mplug2", "--source", str(tmp_path / "jax"), "--out", str(tmp_path / "b"), "--to", "torch"]
    assert command.main(back) == 2
    assert "holds parts of one bert_mplug2 several times; use the original file" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["hugging_face", "openai"])
def test_a_clip_starts_the_tower_and_goes_back(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if layout == "hugging_face":
        (file,) = torch_sources.clip(
            tmp_path / "hf", heads=4, width=64, depth=2, patch=16, image=64, dtype=torch.float32
        )
        source = load_file(file)
    else:
        torch.manual_seed(0)
        source = {name: torch.randn(shape) / 9 for name, shape in torch_sources.openai_names(64, 2, 16, 64).items()}
        torch.save(source, file := tmp_path / "clip.pt")
    argv = ["--model", "clip_mplug2", "--source", str(file), "--out", str(tmp_path / "jax")]
    assert command.main([*argv, "--heads", "vision=4", "--check"]) == 0
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5
    like = jax.eval_shape(lambda: mplug2.init(mplug2.sized("tiny", reads=False), jax.random.key(0)))
    wanted = {path: leaf.shape for path, leaf in state.flatten({"vision": like["vision"]}).items()}
    stored = {path: leaf.shape for path, leaf in trees.stored_params(str(tmp_path / "jax")).items()}
    assert stored == {path: shape for path, shape in wanted.items() if "temporal" not in path}
    assert (
        command.main([*argv[:2], "--source", str(tmp_path / "jax"), "--out", str(tmp_path / "b"), "--to", "torch"]) == 0
    )
    back = load_file(tmp_path / "b" / "model.safetensors")
    assert len(back) > 20 and all(torch.equal(value, source[name]) for name, value in back.items())


def test_a_bert_of_another_size_needs_numbers_of_layers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = bert_file(3)
    source["cls.predictions.decoder.weight"] = source["bert.embeddings.word_embeddings.weight"]
    torch.save(source, tmp_path / "pytorch_model.bin")
    argv = ["--model", "bert_mplug2", "--source", str(tmp_path / "pytorch_model.bin"), "--out", str(tmp_path / "jax")]
    for flags, message in ([], "a BERT of 3 layers is no released size; give --heads fusion=N"), (
        ["fusion=3"], "has 3 layers, too few for 0 universal and 3 fusion layers"
    ):  # fmt: skip
        assert command.main([*argv, "--heads", "text=2", *flags]) == 2
        assert message in capsys.readouterr().err
