"""Language models in the Hugging Face layout: config.json, refused variants, and runs converted back."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_sources import BLOOM, QWEN2, QWEN3, run

import trees
from benchmarks import torch_sources
from ymplug_jax.convert.hub_config import HubConfig
from ymplug_jax.convert.plan import map_of
from ymplug_jax.core import config
from ymplug_jax.models import language_models

FULL = {
    "qwen2.5-1.5b": ("qwen2", 1_543_714_304, {
        "vocab_size": 151936, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "intermediate_size": 8960, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    }),
    "qwen2.5-7b": ("qwen2", 7_615_616_512, {
        "vocab_size": 152064, "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "intermediate_size": 18944, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    }),
    "qwen3-1.7b": ("qwen3", 1_720_574_976, {
        "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 6144, "max_position_embeddings": 40960,
        "rope_theta": 1000000, "tie_word_embeddings": True,
    }),
    "qwen3-8b": ("qwen3", 8_190_735_360, {
        "vocab_size": 151936, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288, "max_position_embeddings": 40960,
        "rope_theta": 1000000, "tie_word_embeddings": False,
    }),
    "bloomz-1b7": ("bloom", 1_722_408_960, {"vocab_size": 250880, "hidden_size": 2048, "n_layer": 24, "n_head": 16}),
    "bloomz-7b1": ("bloom", 7_069_016_064, {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32}),
}  # fmt: skip


@pytest.mark.parametrize("size", FULL)
def test_released_sizes_are_those_of_hugging_face(size: str) -> None:
    """Hugging Face's classes, built on torch's meta device, have the parameter counts and settings of our configs."""
    kind, parameters, values = FULL[size]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **values))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameters
    tied = values.get("tie_word_embeddings", True)
    shapes = {n: tuple(p.shape) for n, p in theirs.state_dict().items() if not (tied and n == "lm_head.weight")}
    module = map_of("bloom" if kind == "bloom" else "qwen")
    plan = module.plan(shapes, {}, HubConfig(Path("config.json"), {"model_type": kind, **values}))
    assert plan.model == language_models.SIZES[size]
    assert sum(int(np.prod(leaf.shape)) for leaf in _leaves(plan.like)) == parameters


def _leaves(tree: dict) -> list:
    return [leaf for part in tree.values() for leaf in (_leaves(part) if isinstance(part, dict) else [part])]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a Qwen2, a Qwen3 and a BLOOM."""
    folder = tmp_path_factory.mktemp("decoders")
    torch_sources.qwen(folder / "qwen2", dtype=torch.float32, **QWEN2)
    torch_sources.qwen(folder / "qwen3", dtype=torch.float32, **QWEN3)
    torch_sources.bloom(folder / "bloom", dtype=torch.float32, **BLOOM)
    return folder


def changed(made: Path, name: str, to: Path, **values: object) -> Path:
    """The model in another folder with a changed config.json; None removes a value."""
    to.mkdir()
    (to / "model.safetensors").symlink_to(made / name / "model.safetensors")
    settings = json.loads((made / name / "config.json").read_text()) | values
    (to / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return to


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("qwen3", {"model_type": "qwen3_moe"}, "model_type is 'qwen3_moe', not qwen2 or qwen3"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is not supported; give a dense Qwen2"),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "rope_scaling of type yarn is not supported; give",
        ),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e6}},
            "rope_scaling of type linear is not",
        ),
        (
            "qwen3",
            {"layer_types": ["sliding_attention"] * 3},
            "use_sliding_window is not supported; give a dense Qwen2",
        ),
        ("qwen2", {"hidden_act": "gelu"}, "hidden_act gelu is not supported; give a dense Qwen2"),
        ("qwen2", {"quantization_config": {"bits": 4}}, "the weights are quantised (quantization_config)"),
        (
            "qwen2",
            {"intermediate_size": 81},
            "intermediate_size is 81, but the weights have 80; download both from the same place",
        ),
        ("qwen2", {"num_hidden_layers": 4}, "num_hidden_layers is 4, but the weights have 3"),
        ("qwen2", {"num_key_value_heads": 4}, "num_key_value_heads is 4, but the weights have 2"),
        ("qwen2", {"num_attention_heads": 5}, "num_attention_heads is 5, but q_proj has 48 rows"),
        ("qwen2", {"num_attention_heads": None}, "num_attention_heads is None, not a whole number"),
        ("qwen2", {"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta is '1e6', not a number above 0"),
        ("qwen2", {"model_type": "qwen3"}, "model_type is 'qwen3', but the weights have no norms of q and k"),
        ("qwen3", {"head_dim": 12}, "head_dim is 12, but the weights have 16"),
        ("bloom", {"n_layer": 5}, "n_layer is 5, but the weights have 3"),
        (
            "bloom",
            {"apply_residual_connection_post_layernorm": True},
            "apply_residual_connection_post_layernorm is true",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, values: dict, message: str
) -> None:
    source = changed(made, name, tmp_path / "source", **values)
    run("--model", name.rstrip("23"), "--source", source, "--out", tmp_path / "out", code=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("error: ") and "config.json: " in line and message in line
    assert not (tmp_path / "out").exists()


def test_a_qwen_needs_its_config(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model.safetensors").symlink_to(made / "qwen2" / "model.safetensors")
    run("--model", "qwen", "--source", tmp_path / "bare", "--out", tmp_path / "out", code=2)
    assert "no config.json beside the weights" in capsys.readouterr().err
    run("--model", "qwen", "--source", made / "qwen2", "--out", tmp_path / "out", "--heads", "llm=2", code=2)
    assert "--heads llm=2: " in capsys.readouterr().err
    run("--model", "gpt3", "--source", made / "qwen3", "--out", tmp_path / "out", code=2)
    assert "try --model qwen" in capsys.readouterr().err
    run("--model", "qwen", "--source", made / "bloom", "--out", tmp_path / "out", code=2)
    assert "try --model bloom" in capsys.readouterr().err


def test_a_tied_head_that_is_there_must_be_the_embedding(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = changed(made, "qwen2", tmp_path / "source")
    tensors = load_file(made / "qwen2" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    (source / "model.safetensors").unlink()
    save_file(tensors, source / "model.safetensors")
    run("--model", "qwen", "--source", source, "--out", tmp_path / "out")
    assert "head/kernel" not in " ".join(trees.stored_params(str(tmp_path / "out")))
    run("--model", "qwen", "--source", tmp_path / "out", "--out", tmp_path / "back", "--to", "torch")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors.keys()
    tensors["lm_head.weight"][3] += 1
    save_file(tensors, source / "model.safetensors")
    run("--model", "qwen", "--source", source, "--out", tmp_path / "other", code=2)
    assert "lm_head.weight and model.embed_tokens.weight are tied" in capsys.readouterr().err


def test_an_untied_qwen_without_its_head_is_not_taken_for_a_tied_one(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Files of embedding models lack the head."""
    source = changed(made, "qwen2", tmp_path / "source", tie_word_embeddings=False)
    run("--model", "qwen", "--source", source, "--out", tmp_path / "out", code=2)
    assert "missing: lm_head.weight" in capsys.readouterr().err


def test_a_run_goes_back_to_hugging_face(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run has no conversion.json, so config.json is made from its settings."""
    run("--model", "qwen", "--source", made / "qwen3", "--out", tmp_path / "run")
    (tmp_path / "run" / "conversion.json").unlink()
    sizes = {"vocab": 97, "width": 48, "depth": 3, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 80}
    lm = language_models.KINDS["qwen"](
        **sizes, rope_theta=5e5, norm_eps=1e-5, qkv_bias=False, qk_norm=True, max_positions=77
    )
    settings = config.Experiment(task="language", model={"llm": lm})
    (tmp_path / "run" / "config.json").write_text(config.to_json(settings))
    run("--model", "bloom", "--source", tmp_path / "run", "--out", tmp_path / "bloom", "--to", "torch", code=2)
    assert "which model bloom does not have; give the --model of its language model" in capsys.readouterr().err
    run("--model", "qwen", "--source", tmp_path / "run", "--out", tmp_path / "back", "--to", "torch")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    original = transformers.AutoModelForCausalLM.from_pretrained(made / "qwen3").eval()
    assert type(loaded).__name__ == "Qwen3ForCausalLM" and loaded.config.max_position_embeddings == 77
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original(ids).logits)
    run("--model", "qwen", "--source", tmp_path / "run", "--out", tmp_path / "back", "--to", "torch", code=2)
    assert "model.safetensors exists; remove it" in capsys.readouterr().err
