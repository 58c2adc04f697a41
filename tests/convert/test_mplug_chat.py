"""The released chat model: to Orbax, checked against PyTorch, and back."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import trees
from benchmarks import torch_sources
from ymplug_jax.convert import mplug_chat as chat_tables
from ymplug_jax.convert import rules
from ymplug_jax.convert.__main__ import main
from ymplug_jax.convert.mplug_chat import plan
from ymplug_jax.core import state
from ymplug_jax.models import language_models, mplug_chat
from ymplug_jax.models.clip_vit import ClipViT

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
    vision, abstractor, llm = (
        config[part][name]
        for part, name in (
            ("vision", "num_attention_heads"),
            ("abstractor", "num_attention_heads"),
            ("bloom", "n_head"),
        )
    )
    return ["--heads", f"vision={vision}", f"abstractor={abstractor}", f"llm={llm}"]


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
    wish = to_orbax.Wish(heads={"vision": 4, "abstractor": 4, "llm": 4})
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


def names_of_the_release() -> set[str]:
    """Every state-dict key of the published model."""
    both = ("weight", "bias")
    names = {"query_tokens", "temporal_query_tokens", "abstractor.vit_eos", "language_model.lm_head.weight"}
    vision, llm = "vision_model.", "language_model.transformer."
    names |= {f"{vision}embeddings.{name}" for name in ("cls_token", "position_embedding", "patch_embed.weight")}
    modules = [f"{vision}embeddings.pre_layernorm", f"{vision}post_layernorm"]
    for i in range(24):
        block = ("temporal.ln", "temporal.down_proj", "temporal.conv", "temporal.up_proj", "self_attn.query_key_value")
        block += ("self_attn.dense", "input_layernorm", "post_attention_layernorm", "mlp.fc1", "mlp.fc2")
        modules += [f"{vision}encoder.layers.{i}.{module}" for module in block]
    for i in range(6):
        layer = (
            "attention.query",
            "attention.key",
            "attention.value",
            "output.out_proj",
            "output.norm2",
            "norm1",
            "normk",
        )
        layer += ("output.mlp.w1", "output.mlp.w2", "output.mlp.w3", "output.mlp.ffn_ln")
        modules += [f"abstractor.encoder.layers.{i}.crossattention.{module}" for module in layer]
    modules += ["abstractor.visual_fc", "abstractor.temporal_visual_fc"]
    for i in range(30):
        block = (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attention.query_key_value",
            "self_attention.dense",
        )
        block += ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
        modules += [f"{llm}h.{i}.{module}" for module in block]
    modules += [f"{llm}word_embeddings_layernorm", f"{llm}ln_f"]
    names |= {f"{llm}word_embeddings.weight"}
    return names | {f"{module}.{part}" for module in modules for part in both}


def test_the_names_are_those_of_the_release() -> None:
    model = mplug_chat.MPLUGChat()
    (layout,) = chat_tables.LAYOUTS.values()
    names = set(rules.expand(layout.rules, chat_tables.like_of(model))) | {copy for copy, _ in layout.tied}
    assert names == names_of_the_release() and len(names) == 992


def test_an_image_only_model_needs_a_flag(tmp_path: Path, weights: dict, heads: list[str], capfd) -> None:
    images = {n: v for n, v in weights.items() if "temporal" not in n}
    save_file(images, tmp_path / "model.safetensors")
    argv = ("--source", tmp_path / "model.safetensors", "--out", tmp_path / "jax", *heads)
    assert convert(*argv) == 2
    assert (
        "this is the image-only model; give the video model, or --allow_missing '.*temporal.*'"
        in capfd.readouterr().err
    )
    assert not (tmp_path / "jax").exists()
    assert convert(*argv, "--allow_missing", ".*temporal.*") == 0
    stored = trees.stored_params(str(tmp_path / "jax"))
    assert not [path for path in stored if "temporal" in path] and "vision/patch/kernel" in stored
    # What is missing is what a run may initialise.
    model = chat_tables.model_of(
        {n: tuple(v.shape) for n, v in images.items()}, {"vision": 4, "abstractor": 4, "llm": 4}
    )
    fresh = state.flatten(chat_tables.like_of(model)).keys() - stored.keys()
    assert all(any(re.fullmatch(pattern, path) for pattern in mplug_chat.TEMPORAL) for path in fresh)
    assert not model.vision.double_cls


def test_heads_that_no_tensor_tells_are_asked_for(tmp_path: Path, weights: dict, heads: list[str], capfd) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    for i, name in enumerate(("vision", "abstractor", "llm"), start=1):
        given = [heads[0], *(one for k, one in enumerate(heads[1:], start=1) if k != i)]
        assert convert("--source", tmp_path / "model.safetensors", "--out", tmp_path / "jax", *given) == 2
        assert f"the number of attention heads for {name} of width" in capfd.readouterr().err


@pytest.mark.parametrize("form", ["bin", "shards", "tied"])
def test_other_files_give_the_same_model(tmp_path: Path, weights: dict, heads: list[str], form: str) -> None:
    """One pickle, pickles with an index, and a stored output layer, which is written back."""
    source = tmp_path / "source"
    source.mkdir()
    tied = {"language_model.lm_head.weight": weights["language_model.transformer.word_embeddings.weight"]}
    weights = weights | tied if form == "tied" else {n: v for n, v in weights.items() if n not in tied}
    if form == "shards":
        names = sorted(weights)
        files = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
        for file, part in files.items():
            torch.save({name: weights[name] for name in part}, source / file)
        places = {name: file for file, part in files.items() for name in part}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    else:
        torch.save(weights, source / "pytorch_model.bin")
    assert convert("--source", source, "--out", tmp_path / "jax", *heads) == 0
    assert convert("--source", tmp_path / "jax", "--out", tmp_path / "torch", "--to", "torch") == 0
    back = load_file(tmp_path / "torch" / "model.safetensors")
    assert back.keys() == weights.keys() and all(torch.equal(back[name], value) for name, value in weights.items())


@pytest.mark.parametrize("layout", ["hugging_face", "openai"])
def test_clip_becomes_the_tower_and_goes_back(tmp_path: Path, layout: str, capfd: pytest.CaptureFixture) -> None:
    sizes = {"width": 64, "depth": 2, "patch": 8, "image": 32, "dtype": torch.float32}
    if layout == "hugging_face":
        (file,) = torch_sources.clip(tmp_path / "source", heads=4, **sizes)
        tensors = load_file(file)
    else:
        shapes = torch_sources.openai_names(64, 2, 8, 32)
        generator = torch.Generator().manual_seed(0)
        tensors = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}
        file = tmp_path / "clip.pt"
        torch.save(tensors, file)
    given = [
        "--model",
        "clip_chat",
        "--source",
        str(file),
        "--out",
        str(tmp_path / "jax"),
        "--heads",
        "vision=4",
        "--check",
    ]
    assert main(given) == 0
    assert float(capfd.readouterr().out.split()[-1]) < 1e-5
    like = chat_tables.like_of(
        mplug_chat.MPLUGChat(vision=ClipViT(32, 8, 2, 64, 4, 256), llm=language_models.SIZES["bloom-tiny"])
    )
    stored, wanted = trees.stored_params(str(tmp_path / "jax")), state.flatten({"vision": like["vision"]})
    assert {path for path in wanted if "temporal" not in path} == stored.keys()
    assert all(stored[path].shape == wanted[path].shape for path in stored)
    back = [
        "--model",
        "clip_chat",
        "--source",
        str(tmp_path / "jax"),
        "--out",
        str(tmp_path / "torch"),
        "--to",
        "torch",
    ]
    assert main(back) == 0
    found = load_file(tmp_path / "torch" / "model.safetensors")
    kept = ("vision_model.", "visual.")
    own = {
        n for n in tensors if n.startswith(kept) and n not in ("visual.proj", "vision_model.embeddings.position_ids")
    }
    assert found.keys() == own and all(torch.equal(found[name], tensors[name]) for name in own)
