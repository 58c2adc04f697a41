"""Round trips of every kind of source: outputs agree with PyTorch, and tensors come back bit for bit."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from safetensors.torch import load_file, save_file

import trees
from benchmarks import torch_sources
from ymplug_jax.convert import __main__ as command
from ymplug_jax.convert import rules
from ymplug_jax.convert.plan import extra, map_of
from ymplug_jax.convert.torch_file import Source
from ymplug_jax.core import stored_params

BLOOM = {"width": 64, "depth": 3, "heads": 4, "vocab": 97}
IMAGE = {"width": 64, "depth": 2, "heads": 4, "patch": 16, "image": 64}
QWEN = {
    "vocab_size": 97, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 80, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}  # fmt: skip
QWEN2 = QWEN | {"kind": "qwen2", "tie_word_embeddings": True}
QWEN3 = QWEN | {"kind": "qwen3", "tie_word_embeddings": True, "head_dim": 16}  # N * H is not D
MEGATRON = {"width": 96, "depth": 3, "vocab": 101, "positions": 40}
HEADS = ["--heads", "llm=4", "vision=4", "text=4"]
SOURCES = {
    "bloom": ("bloom", "bloom", BLOOM, "float32"),
    "bloom in half precision": ("bloom", "bloom", BLOOM, "float16"),
    "bloom in shards": ("bloom", "bloom", BLOOM | {"shard": "100KB"}, "bfloat16"),
    "qwen2": ("qwen", "qwen", QWEN2, "float32"),
    "qwen2.5, untied in shards": ("qwen", "qwen", QWEN2 | {"tie_word_embeddings": False, "shard": "50KB"}, "bfloat16"),
    "qwen3": ("qwen", "qwen", QWEN3, "bfloat16"),
    "qwen3, untied": ("qwen", "qwen", QWEN3 | {"tie_word_embeddings": False}, "float32"),
    "bert": ("bert", "bert", {"width": 64, "depth": 4, "heads": 4, "vocab": 97}, "float32"),
    "clip": ("clip", "clip", IMAGE, "float32"),
    "openai archive": ("clip", "openai", IMAGE, "float16"),
    "openai state dict": ("clip", "openai", IMAGE | {"archive": False}, "float32"),
    "timm": ("vit", "timm", IMAGE, "float32"),
    "timm in the form of clip": ("vit", "timm", IMAGE | {"clip": True}, "float32"),
    "gpt3": ("gpt3", "megatron", MEGATRON, "bfloat16"),
    "gpt3 in two pieces": ("gpt3", "megatron", MEGATRON | {"pieces": 2}, "float32"),
}


def run(*argv: object, code: int = 0) -> None:
    assert command.main([str(arg) for arg in argv]) == code


def make(name: str, folder: Path) -> tuple[str, list[Path]]:
    model, writer, sizes, dtype = SOURCES[name]
    return model, getattr(torch_sources, writer)(folder, dtype=getattr(torch, dtype), **sizes)


@pytest.mark.parametrize("name", SOURCES)
def test_there_agrees_and_back_is_equal(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, files = make(name, tmp_path / "source")
    run("--model", model, "--source", *files, "--out", tmp_path / "out", "--check", *HEADS)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("check: ") and float(line.split()[-1]) < 1e-5, line

    run("--model", model, "--source", tmp_path / "out", "--out", tmp_path / "back", "--to", "torch")
    back = load_file(tmp_path / "back" / "model.safetensors")
    module, facts = map_of(model), json.loads((tmp_path / "out" / "conversion.json").read_text())
    source = Source(files, extra(module, "MERGE"), extra(module, "RENAME", ()))
    # The video encoder has no key biases.
    zeros = {n for n in back if n.startswith("vision_model.") and n.endswith("k_proj.bias")}
    assert set(back) - zeros == set(source.shapes()) - set(facts["dropped"])
    for tensor, value in back.items():
        mine, theirs = value.numpy() if value.dtype != torch.bfloat16 else value.view(torch.uint16).numpy(), None
        if tensor not in zeros:
            theirs = source.read(tensor)
            theirs = theirs.view(np.uint16) if theirs.dtype.name == "bfloat16" else np.array(theirs)
        if tensor in zeros:
            assert not mine.any()
        elif tensor.endswith((".attn.in_proj_bias", ".attn.qkv.bias")):  # its middle third is the key bias
            third = len(mine) // 3
            theirs[third : 2 * third] = 0
        assert tensor in zeros or (mine.dtype == theirs.dtype and mine.tobytes() == theirs.tobytes()), tensor


def test_shards_of_torch_save_with_the_names_of_the_bare_model(tmp_path: Path) -> None:
    _, files = make("bloom", tmp_path / "source")
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(files[0]).items()}
    names = sorted(tensors)
    where = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(where.values()):
        torch.save({name: tensors[name] for name in names if where[name] == file}, tmp_path / file)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    run("--model", "bloom", "--source", index, "--out", tmp_path / "out", *HEADS)
    run("--model", "bloom", "--source", tmp_path / "out", "--out", tmp_path / "back", "--to", "torch")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert len(back) == len(tensors) and all(torch.equal(back[f"transformer.{n}"], v) for n, v in tensors.items())
    (tmp_path / where[names[0]]).unlink()
    run("--model", "bloom", "--source", index, "--out", tmp_path / "other", *HEADS, code=2)


def test_eight_pieces_in_megatrons_own_folders(tmp_path: Path) -> None:
    """model/mp_rank_XX/model_optim_rng.pt holds nested dicts, the arguments of the run and the optimizer's state."""
    import argparse

    def nested(tensors: dict) -> dict:
        tree: dict = {}
        for name, value in tensors.items():
            top, kind, rest = name.split(".", 2)
            tree.setdefault(top, {}).setdefault(kind, {})[rest] = value
        return {"model": tree, "args": argparse.Namespace(rank=0), "optimizer": {"m": torch.ones(3)}, "iteration": 7}

    sizes = MEGATRON | {"vocab": 104}
    whole = torch_sources.megatron(tmp_path / "one", dtype=torch.float16, **sizes)
    files = []
    pieces = torch_sources.megatron(tmp_path / "eight", dtype=torch.float16, pieces=8, wrap=nested, **sizes)
    for i, file in enumerate(pieces):
        folder = tmp_path / "model" / f"mp_rank_{i:02d}"
        folder.mkdir(parents=True)
        files.append(file.rename(folder / "model_optim_rng.pt"))
    for out, sources in (("a", whole), ("b", files)):
        run("--model", "gpt3", "--source", *sources, "--out", tmp_path / out, *HEADS)
        run("--model", "gpt3", "--source", tmp_path / out, "--out", tmp_path / f"{out}-back", "--to", "torch")
    one, eight = (load_file(tmp_path / f"{out}-back" / "model.safetensors") for out in "ab")
    assert one.keys() == eight.keys() and all(torch.equal(one[name], eight[name]) for name in one)
    assert len(json.loads((tmp_path / "b" / "conversion.json").read_text())["sources"]) == 8
    run("--model", "gpt3", "--source", *files[:7], "--out", tmp_path / "c", *HEADS, code=2)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [((2048, 24), 1_317_654_528), ((2560, 32), 2_653_967_360), ((5120, 40), 12_858_214_400)],
    ids=["1.3b", "2.7b", "13b"],
)
def test_released_sizes_of_gpt3_are_known(size: tuple[int, int], parameters: int) -> None:
    width, depth = size
    shapes = torch_sources.megatron_names(width, depth, 51200, 2048)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    module = map_of("gpt3")
    plan = module.plan(shapes, {})
    assert rules.expand(module.LAYOUTS[plan.layout].rules, plan.like).keys() == shapes.keys()


def test_a_conversion_loads_on_any_mesh(tmp_path: Path) -> None:
    model, files = make("bloom", tmp_path / "source")
    run("--model", model, "--source", *files, "--out", tmp_path / "out", *HEADS)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"))
    stored = trees.stored_params(str(tmp_path / "out"))

    def place(path: str, leaf) -> jax.ShapeDtypeStruct:
        axes = [None] * len(leaf.shape)
        if path.endswith("attn/q/kernel"):  # [layers, D, N, H]
            axes[1:3] = "fsdp", "tensor"
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=jax.sharding.NamedSharding(mesh, spec))

    like = unflatten_dict({path: place(path, leaf) for path, leaf in stored.items()}, sep="/")
    kernel = stored_params.load_params(str(tmp_path / "out"), like)["llm/blocks/attn/q/kernel"]
    assert len(kernel.addressable_shards) == 8 and kernel.addressable_shards[0].data.shape == (3, 32, 1, 16)
    fused = load_file(files[0])["transformer.h.2.self_attention.query_key_value.weight"].numpy()
    np.testing.assert_array_equal(kernel[2], fused.reshape(4, 3, 16, 64)[:, 0].transpose(2, 0, 1))


def test_the_classes_of_hugging_face_load_what_comes_back(tmp_path: Path) -> None:
    """Folders of language models load as written; for CLIP the original config.json is added."""
    import transformers

    causal = transformers.AutoModelForCausalLM
    for name, cls in (
        ("bloom", causal), ("clip", transformers.CLIPVisionModel), ("qwen2", causal), ("qwen3, untied", causal),
    ):  # fmt: skip
        model, files = make(name, tmp_path / name)
        run("--model", model, "--source", *files, "--out", tmp_path / f"{name}-out", *HEADS)
        back = tmp_path / f"{name}-back"
        run("--model", model, "--source", tmp_path / f"{name}-out", "--out", back, "--to", "torch")
        if name == "clip":
            (back / "config.json").write_bytes((tmp_path / name / "config.json").read_bytes())
        loaded, info = cls.from_pretrained(back, output_loading_info=True)
        assert not [n for n in info["missing_keys"] if n != "lm_head.weight"] and not info["unexpected_keys"], info
        original = cls.from_pretrained(tmp_path / name)
        for key, value in original.state_dict().items():
            if not key.endswith("k_proj.bias"):
                assert torch.equal(loaded.state_dict()[key], value), key


def test_a_check_finds_a_wrong_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from ymplug_jax.convert import bloom
    from ymplug_jax.convert.plan import Layout

    wrong = [
        rule._replace(layout=rule.layout.replace("(n part h)", "(part n h)"))
        for rule in bloom.LAYOUTS["hugging_face"].rules
    ]
    monkeypatch.setattr(bloom, "LAYOUTS", {"hugging_face": Layout(tuple(wrong), tied=bloom.TIED)})
    model, files = make("bloom", tmp_path / "source")
    run("--model", model, "--source", *files, "--out", tmp_path / "out", "--check", *HEADS, code=1)
    assert "block 0  DIFFERS" in capsys.readouterr().err


def test_adapters_are_added_or_kept(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, files = make("bloom", tmp_path / "source")
    adapter = torch_sources.adapter(tmp_path / "lora", width=64, depth=3, rank=4, alpha=16)
    plain = load_file(files[0])
    for folder, more in (("merged", ()), ("kept", ("--keep_lora",))):
        argv = ("--model", model, "--source", *files, "--lora", adapter, *more, *HEADS)
        run(*argv, "--out", tmp_path / folder, "--check")
        assert float(capsys.readouterr().out.split()[-1]) < 1e-5
        run("--model", model, "--source", tmp_path / folder, "--out", tmp_path / f"{folder}-back", "--to", "torch")
    facts = json.loads((tmp_path / "kept" / "conversion.json").read_text())
    (llm,) = facts["sizes"].values()
    assert (llm["lora_rank"], llm["lora_scale"], llm["lora_targets"]) == (4, 16 / 4, ["attn/[qkv]"])
    back = load_file(tmp_path / "kept-back" / "adapter_model.safetensors")
    stored = {
        n.removeprefix("base_model.model."): v for n, v in load_file(adapter / "adapter_model.safetensors").items()
    }
    assert back.keys() == stored.keys() and all(torch.equal(back[n], v) for n, v in stored.items())
    kept, merged = (load_file(tmp_path / f"{name}-back" / "model.safetensors") for name in ("kept", "merged"))
    assert all(torch.equal(kept[name], plain[name]) for name in kept)
    changed = [name for name in merged if not torch.equal(merged[name], plain[name])]
    assert sorted(changed) == [f"transformer.h.{i}.self_attention.query_key_value.weight" for i in range(3)]
    # An adapter among the weights has no scale, and a guess would change the model.
    save_file(plain | back, tmp_path / "both.safetensors")
    run("--model", model, "--source", tmp_path / "both.safetensors", *HEADS, "--out", tmp_path / "both", code=2)
    assert "without its scale" in capsys.readouterr().err and not (tmp_path / "both").exists()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16, "use_dora": True})
    )
    run(*argv, "--out", tmp_path / "dora", code=2)
    assert "use_dora" in capsys.readouterr().err


def test_types_by_subtree(tmp_path: Path) -> None:
    model, files = make("bloom", tmp_path / "source")
    adapter = torch_sources.adapter(tmp_path / "lora", width=64, depth=3, rank=4, alpha=16)
    argv = ("--model", model, "--source", *files, "--lora", adapter, "--keep_lora", *HEADS)
    run(*argv, "--out", tmp_path / "out", "--dtype", "frozen=bfloat16")
    stored = trees.stored_params(str(tmp_path / "out"))
    assert {path.split("/")[2]: str(leaf.dtype) for path, leaf in stored.items() if path.startswith("llm/blocks")} == {
        "attn": "bfloat16",
        "attn_norm": "bfloat16",
        "mlp": "bfloat16",
        "mlp_norm": "bfloat16",
        "lora": "float32",
    }
    run(*argv, "--out", tmp_path / "other", "--dtype", "nothing=bfloat16", code=2)
    run(*argv, "--out", tmp_path / "other", "--dtype", "llm=int7", code=2)


def test_tables_are_resized(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, files = make("clip", tmp_path / "source")
    run("--model", model, "--source", *files, "--out", tmp_path / "out", "--image_size", 96, *HEADS)
    assert trees.stored_params(str(tmp_path / "out"))["vision/pos_embed"].shape == (37, 64)
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["resized"] == {"vision/pos_embed": [37, 64]}
    run("--model", model, "--source", *files, "--out", tmp_path / "no", "--frames", 8, *HEADS, code=2)
    assert "no vision/temporal_embed to resize" in capsys.readouterr().err


def test_copies_of_tied_tensors_must_be_equal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, (file,) = make("bert", tmp_path / "source")
    tensors = torch.load(file, weights_only=True)
    tensors["cls.predictions.decoder.weight"] = tensors["cls.predictions.decoder.weight"] + 1
    torch.save(tensors, file)
    run("--model", model, "--source", file, "--out", tmp_path / "out", *HEADS, code=2)
    assert (
        "cls.predictions.decoder.weight and bert.embeddings.word_embeddings.weight are tied" in capsys.readouterr().err
    )


def test_other_models_and_damaged_values_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, bloom = make("bloom", tmp_path / "bloom")
    _, clip = make("openai archive", tmp_path / "clip")
    run("--model", "bert", "--source", *bloom, "--out", tmp_path / "out", *HEADS, code=2)
    assert "try --model bloom" in capsys.readouterr().err
    run("--model", "bloom", "--source", *clip, "--out", tmp_path / "out", *HEADS, code=2)
    assert "try --model clip" in capsys.readouterr().err

    tensors = load_file(bloom[0])
    for name, value, message in (
        ("double", tensors["transformer.ln_f.weight"].double(), "is float64"),
        ("quantised", tensors["transformer.ln_f.weight"].to(torch.int8), "is I8"),
        ("nan", torch.full((64,), float("nan")), "values that are not finite"),
        ("short", torch.ones(63), "transformer.ln_f.weight: expected (64,), found (63,)"),
    ):
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors | {"transformer.ln_f.weight": value}, file)
        run("--model", "bloom", "--source", file, "--out", tmp_path / name, *HEADS, code=2)
        assert message in capsys.readouterr().err
        assert not (tmp_path / name / "checkpoints" / "converted").exists()

    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../bloom/model.safetensors"}}))
    run("--model", "bloom", "--source", index, "--out", tmp_path / "out", *HEADS, code=2)
    assert "outside its folder" in capsys.readouterr().err


def test_a_flipped_bit_is_found_by_the_checksum(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, (file,) = make("gpt3", tmp_path / "source")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    run("--model", model, "--source", file, "--out", tmp_path / "out", *HEADS, code=2)
    assert "does not match its checksum" in capsys.readouterr().err


def test_an_archive_that_asks_for_more_than_tensors_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import zipfile

    _, (file,) = make("openai archive", tmp_path / "source")
    marker = tmp_path / "it ran"
    evil = f"cbuiltins\nexec\n(Vopen({str(marker)!r}, 'w')\ntR.".encode()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "evil.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, evil if name.endswith("/data.pkl") else old.read(name))
    run("--model", "clip", "--source", tmp_path / "evil.pt", "--out", tmp_path / "out", *HEADS, code=2)
    assert "its pickle refers to builtins.exec" in capsys.readouterr().err and not marker.exists()


def test_the_release_of_mplug_video_agrees(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    golden = Path(__file__).parents[1] / "golden" / "mplug_video_gpt3" / "pretrain.npz"
    with np.load(golden) as arrays:
        tensors = {k.removeprefix("param/"): torch.from_numpy(arrays[k]) for k in arrays if k.startswith("param/")}
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": tensors}, file)
    argv = ("--model", "mplug_video", "--source", file, *HEADS)
    run(*argv, "--out", tmp_path / "out", "--check")
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5
    run(*argv, "--out", tmp_path / "longer", "--frames", 8)
    stored = trees.stored_params(str(tmp_path / "longer"))["vision/temporal_embed"]
    assert stored.shape[0] == 8
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = {"vision": {"temporal_embed": jax.ShapeDtypeStruct(stored.shape, np.float32, sharding=place)}}
    value = stored_params.load_params(str(tmp_path / "longer"), like)["vision/temporal_embed"]
    np.testing.assert_allclose(value[0], tensors["visual_encoder.temporal_embed"][0, 0].numpy(), rtol=1e-6)


def test_a_different_number_of_heads_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """CLIP's ViT-B/16 was trained with 12 heads; the video encoder has 8."""
    shapes = {
        "vision_model.embeddings.patch_embedding.weight": (768, 3, 16, 16),
        "vision_model.embeddings.position_embedding.weight": (197, 768),
        "vision_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    }
    assert map_of("clip").plan(shapes, {}).model.heads == 8
    assert "trained with 12 heads" in caplog.text and "--heads vision=12" in caplog.text
    caplog.clear()
    assert map_of("clip").plan(shapes, {"vision": 12}).model.heads == 12
    assert not caplog.text
