"""Adapters in PEFT's layout: written alone and loaded by PEFT, read back, merged, and refused where they are not plain LoRA."""

import json
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_sources import BLOOM, QWEN2, run

from benchmarks import torch_sources
from ymplug_jax.convert.store import Store
from ymplug_jax.core import config, state
from ymplug_jax.models import language_model, language_models, mplug_chat
from ymplug_jax.models.clip_vit import ClipViT
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.models.query_abstractor import QueryAbstractor

# A property of transformers that PEFT still reads.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
ALL = ("attn/.*", "mlp/.*")
RANK, ALPHA = 4, 10


def stored(folder: Path, params: dict, model: object, name: str) -> Path:
    """A conversion with these parameters, as `convert` writes it."""
    store = Store(folder, {"model": name})
    flat = state.flatten(params)
    for path, leaf in flat.items():
        store.write(path, None, np.asarray(leaf), leaf.shape)
        store.wrote(path)
    facts = {"model": name, "sizes": {type(model).__name__: config.settings_of(model)}, "tied": []}
    store.finish(sorted(flat), facts)
    return folder


def random(like: dict, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), like)


def decoder(kind: str, targets: tuple[str, ...]) -> LanguageModel:
    size = {"gpt3": "tiny", "bloom": "bloom-tiny", "qwen": "qwen-tiny"}[kind]
    return language_models.SIZES[size].clone(lora_rank=RANK, lora_scale=ALPHA / RANK, lora_targets=targets)


def like_of(lm: LanguageModel) -> dict:
    return jax.eval_shape(lambda: language_model.init(lm, jax.random.key(0)))


def logits(lm: LanguageModel, params: dict, ids: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(lm.apply({"params": params}, ids, method=lambda lm, ids: lm.logits(lm(lm.embed(ids)))))


@pytest.mark.parametrize(("kind", "targets"), [("bloom", ("attn/[qkv]",)), ("bloom", ALL), ("qwen", ALL)])
def test_peft_loads_adapters_of_a_decoder(tmp_path: Path, kind: str, targets: tuple[str, ...]) -> None:
    lm = decoder(kind, targets)
    params = {"llm": random(like_of(lm))}
    folder = stored(tmp_path / "jax", params, lm, kind)
    run("--model", kind, "--source", folder, "--out", tmp_path / "base", "--to", "torch")
    run("--model", kind, "--source", folder, "--out", tmp_path / "peft", "--to", "torch", "--layout", "peft")
    run("--model", kind, "--source", folder, "--out", tmp_path / "merged", "--to", "torch", "--merge_lora")
    assert {file.name for file in (tmp_path / "peft").iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    names = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in names)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ids = np.random.default_rng(1).integers(3, lm.vocab, (2, 9))
    with torch.inference_mode():
        plain = base(torch.from_numpy(ids)).logits.numpy()
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")(torch.from_numpy(ids)).logits.numpy()
    ours = logits(lm, params["llm"], ids)
    assert np.abs(theirs - ours).max() <= 1e-4 * max(1, np.abs(ours).max())
    assert np.abs(plain - ours).max() > 1e-2
    # Merged weights are W + scale * B A, and the others stay as they are.
    kept, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    changed = set()
    for name, weight in kept.items():
        a, b = (names.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight") for side in "AB")
        expected = weight if a is None else weight + ALPHA / RANK * (b.double() @ a.double()).float()
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=0 if a is None else 1e-6)
        changed |= set() if a is None else {name}
    assert 2 * len(changed) == len(names) and not (tmp_path / "merged" / "adapter_model.safetensors").exists()


class Released(torch.nn.Module):
    """The modules of the released chat model that adapters could be mistaken for, around a language model."""

    def __init__(self, llm: torch.nn.Module) -> None:
        super().__init__()
        attention = torch.nn.ModuleDict({"query_key_value": torch.nn.Linear(8, 24), "dense": torch.nn.Linear(8, 8)})
        layer = torch.nn.ModuleDict({"self_attn": attention})
        self.vision_model = torch.nn.ModuleDict(
            {"encoder": torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer])})}
        )
        self.language_model = llm

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.language_model(ids).logits


def test_peft_loads_adapters_of_the_chat_model(tmp_path: Path) -> None:
    lm = decoder("bloom", ALL)
    model = mplug_chat.MPLUGChat(
        ClipViT(image_size=8, patch_size=4, width=32, depth=1, heads=2, mlp=32),
        QueryAbstractor(queries=2, depth=1, heads=2, mlp=32),
        lm,
    )
    params = random(jax.eval_shape(lambda: mplug_chat.init(model, jax.random.key(0))))
    folder = stored(tmp_path / "jax", params, model, "mplug_chat")
    run("--model", "bloom", "--source", folder, "--out", tmp_path / "base", "--to", "torch")
    run("--model", "mplug_chat", "--source", folder, "--out", tmp_path / "peft", "--to", "torch", "--layout", "peft")
    base = Released(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    assert "lora" not in " ".join(name for name, _ in base.vision_model.named_parameters())
    ids = np.random.default_rng(1).integers(3, lm.vocab, (2, 9))
    with torch.inference_mode():
        theirs = adapted(torch.from_numpy(ids)).numpy()
    ours = logits(lm, params["llm"], ids)
    assert np.abs(theirs - ours).max() <= 1e-4 * max(1, np.abs(ours).max())


class Megatron(torch.nn.Module):
    """The linear layers of a GPT-3 under the names of its files."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        d, linear = lm.width, torch.nn.Linear

        def layer() -> torch.nn.ModuleDict:
            attention = {"query_key_value": linear(d, 3 * d), "dense": linear(d, d)}
            mlp = {"dense_h_to_4h": linear(d, 4 * d), "dense_4h_to_h": linear(4 * d, d)}
            return torch.nn.ModuleDict(
                {"self_attention": torch.nn.ModuleDict(attention), "mlp": torch.nn.ModuleDict(mlp)}
            )

        layers = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer() for _ in range(lm.depth)])})
        self.language_model = torch.nn.ModuleDict({"encoder": layers})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_peft_merges_adapters_of_gpt3_as_we_do(tmp_path: Path) -> None:
    """No public class has the names of ModelScope's files, so the merged weights are compared."""
    lm = decoder("gpt3", ALL)
    folder = stored(tmp_path / "jax", {"llm": random(like_of(lm))}, lm, "gpt3")
    for name, more in (("base", ()), ("peft", ("--layout", "peft")), ("merged", ("--merge_lora",))):
        run("--model", "gpt3", "--source", folder, "--out", tmp_path / name, "--to", "torch", *more)
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    model = Megatron(lm)
    model.load_state_dict({name: base[name] for name in model.state_dict()})
    whole = peft.PeftModel(model, peft.PeftConfig.from_pretrained(tmp_path / "peft"))
    whole.load_adapter(tmp_path / "peft", "default")
    for name, weight in whole.merge_and_unload().state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=0, atol=1e-5)
        assert name.endswith("bias") or not torch.equal(weight, base[name])


@pytest.mark.parametrize("kind", ["bloom", "qwen"])
def test_adapters_of_peft_come_back(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    """PEFT adapts all linear layers of Hugging Face's model; we keep the adapter, compare the outputs, and write it back equal."""
    source = tmp_path / "source"
    if kind == "bloom":
        torch_sources.bloom(source, dtype=torch.float32, **BLOOM)
    else:
        torch_sources.qwen(source, dtype=torch.float32, **QWEN2)
    base = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    made = peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True)
    adapted = peft.get_peft_model(base, made)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    heads = ("--heads", "llm=4") if kind == "bloom" else ()
    argv = ("--model", kind, "--source", source, "--lora", tmp_path / "adapter", "--keep_lora", *heads)
    run(*argv, "--out", tmp_path / "jax", "--check")
    assert float(capsys.readouterr().out.split()[-1]) < 1e-5
    (llm,) = json.loads((tmp_path / "jax" / "conversion.json").read_text())["sizes"].values()
    assert (llm["lora_rank"], llm["lora_scale"]) == (3, 7 / 3**0.5)
    run("--model", kind, "--source", tmp_path / "jax", "--out", tmp_path / "back", "--to", "torch", "--layout", "peft")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
    assert before.keys() == after.keys() and all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "not use_dora; merge the adapter with PEFT"),
        ({"rank_pattern": {"h.0": 2}}, "not rank_pattern;"),
        ({"alpha_pattern": {"h.0": 2}}, "not alpha_pattern;"),
        ({"bias": "all"}, "not bias all;"),
        ({"lora_bias": True}, "not lora_bias;"),
        ({"peft_type": "IA3"}, "not peft_type IA3;"),
        ({"modules_to_save": ["lm_head"]}, "not modules_to_save;"),
        ({"init_lora_weights": "pissa"}, "not init_lora_weights pissa, which changes the weights of the model;"),
        ({"r": 8}, "r is 8, but "),
        ({"r": 0}, "r and lora_alpha are not numbers above 0"),
        ("grouped", "an old PEFT adapted parts of a fused matrix through a grouped convolution"),
        ("other layer", "adapters of this layer cannot be kept"),
    ],
)
def test_other_adapters_are_refused(
    tmp_path: Path, change: dict | str, message: str, capsys: pytest.CaptureFixture
) -> None:
    (source,) = torch_sources.bloom(tmp_path / "source", dtype=torch.float32, **BLOOM)
    folder = torch_sources.adapter(tmp_path / "lora", width=BLOOM["width"], depth=BLOOM["depth"], rank=4, alpha=16)
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    if change == "grouped":
        save_file({n: t[..., None] if "lora_B" in n else t.repeat(2, 1) for n, t in tensors.items()}, file)
    elif change == "other layer":
        save_file({n.replace("self_attention.query_key_value", "input_layernorm"): t for n, t in tensors.items()}, file)
    else:
        settings.write_text(json.dumps(json.loads(settings.read_text()) | change))
    argv = ("--model", "bloom", "--source", source, "--lora", folder, "--keep_lora", "--heads", "llm=4")
    run(*argv, "--out", tmp_path / "out", code=2)
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_without_adapters_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    lm = decoder("bloom", ALL).clone(lora_rank=0)
    folder = stored(tmp_path / "jax", {"llm": random(like_of(lm))}, lm, "bloom")
    argv = ("--model", "bloom", "--source", folder, "--out", tmp_path / "out", "--to", "torch")
    run(*argv, "--layout", "peft", code=2)
    assert "no adapter of model bloom is here" in capsys.readouterr().err
    run(*argv, "--merge_lora", code=2)
    assert "holds no adapters of model bloom; leave it out" in capsys.readouterr().err
    run("--model", "clip", *argv[2:], "--layout", "peft", code=2)
    assert "--layout peft: unknown layout of model clip" in capsys.readouterr().err
    # Adapters of the output projection have the same paths in every decoder.
    qwen = decoder("qwen", ("attn/o",))
    folder = stored(tmp_path / "qwen", {"llm": random(like_of(qwen))}, qwen, "qwen")
    run("--model", "bloom", "--source", folder, *argv[4:], "--layout", "peft", code=2)
    assert "which model bloom does not have; give the --model of its language model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_are_less_than_a_hundredth_of_the_model() -> None:
    model = mplug_chat.MPLUGChat(llm=language_models.SIZES["bloomz-7b1"].clone(lora_rank=8, lora_targets=ALL))
    like = jax.eval_shape(lambda: mplug_chat.init(model, jax.random.key(0)))
    trainable, frozen = state.split(like, mplug_chat.PARTITIONS["lora"])
    assert all("/lora/" in path for path in state.flatten(trainable))
    # Adapters are float32 in a step's checkpoint and in PEFT's file, the rest bfloat16.
    assert 4 * state.count(trainable) < 0.01 * 2 * state.count(frozen)
