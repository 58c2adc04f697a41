"""The released chat model: to Orbax, checked against PyTorch, and back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ymplug_jax.convert.__main__ import main
from ymplug_jax.convert.mplug_chat import plan

GOLDEN = Path(__file__).parents[1] / "golden" / "mplug_video_bloomz" / "full.npz"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN) as file:
        names = [name for name in file.files if name.startswith("param/")]
        return {name.removeprefix("param/"): torch.from_numpy(file[name]) for name in names}


@pytest.fixture(scope="module")
def heads() -> list[str]:
    with np.load(GOLDEN) as file:
        config = json.loads(str(file["config"]))
    return ["--heads", f"vision={config['vision']['num_attention_heads']}", f"llm={config['bloom']['n_head']}"]


def convert(*arguments: object) -> int:
    return main(["--model", "mplug_chat", *map(str, arguments)])


def test_there_and_back(tmp_path: Path, weights: dict, heads: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    assert convert("--source", tmp_path / "model.safetensors", "--out", tmp_path / "jax", "--check", *heads) == 0
    assert "5 modules against PyTorch" in capfd.readouterr().out
    assert convert("--source", tmp_path / "jax", "--out", tmp_path / "torch", "--to", "torch") == 0
    back = load_file(tmp_path / "torch" / "model.safetensors")
    assert set(back) == set(weights)
    for name, value in back.items():
        assert torch.equal(value, weights[name]), name


def test_the_check_sees_a_difference(tmp_path: Path, weights: dict, heads: list[str], capfd) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    assert convert("--source", tmp_path / "model.safetensors", "--out", tmp_path / "jax", *heads) == 0
    name = "vision_model.encoder.layers.1.temporal.conv.weight"
    other = weights | {name: weights[name] * 1.5}
    from ymplug_jax.convert import check, to_orbax

    save_file(other, tmp_path / "other.safetensors")
    wish = to_orbax.Wish(heads={"vision": 4, "llm": 4})
    assert not check.check("mplug_chat", [tmp_path / "other.safetensors"], tmp_path / "jax", wish)
    lines = capfd.readouterr().err.splitlines()
    differs = [line.split("  ")[1] for line in lines if line.endswith("DIFFERS")]
    assert differs == ["clip tokens", "clip slots", "logits"]  # still images pass no adapter


def test_released_sizes(weights: dict) -> None:
    """The published counts: 7,483,234,304 parameters in all."""
    blocks, layers, bloom = 24, 6, 30
    shapes: dict[str, tuple[int, ...]] = {}
    sizes = {
        32: 1024,
        16: 512,
        96: 3072,
        80: 4096,
        256: 2816,
        5: 64,
        17: 257,
        40: 4096,
        120: 12288,
        160: 16384,
        101: 250880,
    }
    for name, value in weights.items():
        shape = tuple(value.shape)
        if name == "vision_model.embeddings.patch_embed.weight":
            shape = (1024, 3, 14, 14)
        else:
            shape = tuple(sizes.get(size, size) for size in shape)
        count = blocks if name.startswith("vision_model.encoder.layers.0.") else 0
        count = layers if name.startswith("abstractor.encoder.layers.0.") else count
        count = bloom if name.startswith("language_model.transformer.h.0.") else count
        if count:
            shapes |= {name.replace(".0.", f".{i}.", 1): shape for i in range(count)}
        elif ".layers.1." not in name and ".h.1." not in name and "lm_head" not in name:
            shapes[name] = shape
    found = plan(shapes, {})

    def total(tree: dict) -> int:
        return sum(total(part) if isinstance(part, dict) else int(np.prod(part.shape)) for part in tree.values())

    assert {name: total(part) for name, part in found.like.items()} == {
        "vision": 303_179_776 + 25_300_992,
        "abstractor": 85_606_400 + 131_072,
        "llm": 7_069_016_064,
    }
    adapters = total(found.like["vision"]["blocks"]["temporal"]) + total(found.like["abstractor"])
    assert adapters == 111_038_464  # trained in the partition "adapters_abstractor"


def test_the_image_only_model_is_refused(tmp_path: Path, weights: dict, heads: list[str], capfd) -> None:
    save_file({n: v for n, v in weights.items() if "temporal" not in n}, tmp_path / "model.safetensors")
    assert convert("--source", tmp_path / "model.safetensors", "--out", tmp_path / "jax", *heads) == 2
    assert "image-only model" in capfd.readouterr().err
    assert not (tmp_path / "jax").exists()
