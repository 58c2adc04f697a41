"""BLOOM and its adapters equal stored outputs of the PyTorch reference; one test for each fixture file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from safetensors.torch import save_file

import trees
from ymplug_jax.convert import bloom as tables
from ymplug_jax.convert import rules, to_orbax
from ymplug_jax.core import checkpoint
from ymplug_jax.models import attention, bloom, layers
from ymplug_jax.models.bloom import Bloom
from ymplug_jax.models.language_model import positions
from ymplug_jax.models.lora import Lora

OUTPUT, GRADIENT = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def model_of(config: dict, **more) -> Bloom:
    return Bloom(
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["n_layer"],
        heads=config["n_head"],
        ln_eps=config["layer_norm_epsilon"],
        **more,
    )


def untied(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    (copy, original) = tables.TIED[0]
    np.testing.assert_array_equal(weights[copy], weights[original])
    return {name: value for name, value in weights.items() if name != copy}


def logits_of(model: Bloom, params: dict, ids: np.ndarray, mask: np.ndarray) -> tuple[jax.Array, dict]:
    embeds = model.apply({"params": params}, ids, method="embed")
    hidden, kept = model.apply({"params": params}, embeds, mask, capture_intermediates=True, mutable="intermediates")
    logits = model.apply({"params": params}, hidden, method="logits")
    return logits, {"embeddings": embeds, "hidden": hidden, **kept["intermediates"]["blocks"]}


def mean_loss(logits: jax.Array, labels: np.ndarray) -> jax.Array:
    targets = labels[:, 1:]
    kept = targets >= 0
    losses = jax.nn.logsumexp(logits[:, :-1], -1) - jnp.take_along_axis(
        logits[:, :-1], np.where(kept, targets, 0)[..., None], -1
    ).squeeze(-1)
    return jnp.sum(losses * kept) / kept.sum()


def test_bloom(read) -> None:
    file = read("bloom.npz")
    model, weights = model_of(file.config), untied(file.group("param"))
    params = trees.to_tree(tables.BLOOM, weights, tables.like_of(model))
    run = jax.jit(lambda *args: logits_of(model, *args))
    for side in ("left", "right"):
        ids, mask = file[f"in/{side}/input_ids"], file[f"in/{side}/attention_mask"]
        logits, out = run(params, ids, mask)
        bias = bloom.slopes(model.heads)[:, None, None] * positions(mask)[:, None, None]
        file.check(f"out/{side}/alibi", bias, OUTPUT)
        file.check(f"out/{side}/embeddings_ln", out["embeddings"], OUTPUT)
        states = jax.tree.leaves(out["__call__"])[0]
        file.check(f"out/{side}/hidden_0", out["embeddings"], OUTPUT)
        file.check(f"out/{side}/hidden_1", states[0], OUTPUT)
        file.check(f"out/{side}/hidden_2", out["hidden"], OUTPUT)
        file.check(f"out/{side}/logits", logits, OUTPUT)
        for i in range(model.depth):
            q, k, v = (out["attn"][part]["__call__"][0][i] for part in "qkv")
            file.check(f"out/{side}/cache_key_{i}", k.transpose(0, 2, 1, 3), OUTPUT)
            file.check(f"out/{side}/cache_value_{i}", v.transpose(0, 2, 1, 3), OUTPUT)
            one_hot = jnp.broadcast_to(jnp.eye(k.shape[1])[:, None], (*k.shape[:3], k.shape[1]))
            seen = mask[:, None, None].astype(bool)
            weights_of_keys = attention.attend(q, k, one_hot, causal=True, mask=seen, bias=bias)
            file.check(f"out/{side}/attn_probs_{i}", weights_of_keys.transpose(0, 2, 1, 3), OUTPUT)

        steps = []
        for _ in range(file.config["num_new_tokens"]):
            step = run(params, ids, mask)[0][:, -1]
            steps.append(step)
            ids = np.concatenate([ids, np.argmax(step, -1)[:, None].astype(ids.dtype)], axis=1)
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
        new = ids[:, -file.config["num_new_tokens"] :]
        np.testing.assert_array_equal(new, file[f"out/{side}/greedy_ids"])
        file.check(f"out/{side}/greedy_step_logits", np.stack(steps), OUTPUT)
        if side == "left":
            stopped = np.cumsum(new == file["in/left/eos_token_id"], axis=1) - (new == file["in/left/eos_token_id"]) > 0
            expected = np.where(stopped, file.config["pad_token_id"], new)
            np.testing.assert_array_equal(expected, file["out/left/greedy_ids_with_eos"])

    ids, mask, labels = (file[f"in/right/{name}"] for name in ("input_ids", "attention_mask", "labels"))
    loss, grads = jax.value_and_grad(lambda p: mean_loss(logits_of(model, p, ids, mask)[0], labels))(params)
    file.check("out/right/loss", loss, OUTPUT)
    file.check_all("grad/right", rules.to_torch(tables.BLOOM, grads), GRADIENT)
    np.testing.assert_array_equal(file["in/lengths"], file["in/left/attention_mask"].sum(axis=1))
    file.done()


def renamed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for pattern, replacement in tables.RENAME:
        weights = {re.sub(pattern, replacement, name): value for name, value in weights.items()}
    return weights


def converted(folder: Path, wish: to_orbax.Wish, source: Path, like: dict) -> dict:
    """Parameters of a conversion, as `init_from` reads them."""
    to_orbax.to_orbax("bloom", [source], folder, wish)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), {"llm": like})
    return unflatten_dict(checkpoint.load_params(str(folder), like), sep="/")["llm"]


def test_lora(read, tmp_path: Path) -> None:
    file = read("lora.npz")
    config, weights = file.config, untied(renamed(file.group("param")))
    plain = model_of(config["bloom"])
    model = plain.clone(lora_rank=config["r"], lora_scale=config["alpha"] / config["r"])
    base = {name: torch.from_numpy(value) for name, value in weights.items() if "lora_" not in name}
    adapter = {f"base_model.model.{n}": torch.from_numpy(value) for n, value in weights.items() if "lora_" in n}
    save_file(base, tmp_path / "model.safetensors")
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": config["r"], "lora_alpha": config["alpha"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    wish = to_orbax.Wish(heads={"llm": plain.heads}, adapter=tmp_path)
    source = tmp_path / "model.safetensors"
    merged = converted(tmp_path / "merged", wish, source, tables.like_of(plain))
    params = converted(tmp_path / "kept", wish._replace(keep_adapter=True), source, tables.like_of(model))
    without = {**params, "blocks": {k: v for k, v in params["blocks"].items() if k != "lora"}}

    ids, mask = file["in/input_ids"], file["in/attention_mask"]
    file.check("out/logits_base", logits_of(plain, without, ids, mask)[0], OUTPUT)
    file.check("out/logits_lora", logits_of(model, params, ids, mask)[0], OUTPUT)
    logits = logits_of(plain, merged, ids, mask)[0]
    assert np.abs(logits - file["out/logits_lora"]).max() <= OUTPUT * np.abs(file["out/logits_lora"]).max()
    name = "transformer.h.0.self_attention.query_key_value.weight"
    file.check("out/merged_weight_h0", rules.to_torch(tables.BLOOM, merged)[name], OUTPUT)

    x, block = file["in/x"], jax.tree.map(lambda leaf: leaf[0], params["blocks"])
    attn = layers.Attention(plain.width, plain.heads, *[jax.nn.initializers.zeros] * 2)
    qkv = attn.apply({"params": block["attn"]}, x, method="project")
    change = Lora(model.lora_rank, model.lora_scale, model.heads, "float32").apply({"params": block["lora"]}, x)
    changed = [whole + part for whole, part in zip(qkv, change, strict=True)]
    for name, parts in (("base", qkv), ("lora", changed)):
        file.check(f"out/linear_{name}", np.stack(parts, axis=3).reshape(*x.shape[:2], -1), OUTPUT)
    bias = bloom.slopes(model.heads)[:, None, None] * np.arange(x.shape[1])
    y = attn.apply({"params": block["attn"]}, attention.attend(*changed, causal=True, bias=bias), method="output")
    file.check("out/attention_lora", y, OUTPUT)

    def loss_of(lora: dict) -> jax.Array:
        whole = {**params, "blocks": {**params["blocks"], "lora": lora}}
        return mean_loss(logits_of(model, whole, ids, mask)[0], file["in/labels"])

    loss, grads = jax.value_and_grad(loss_of)(params["blocks"]["lora"])
    file.check("out/loss_lora", loss, OUTPUT)
    zeros = jax.tree.map(jnp.zeros_like, params)
    named = rules.to_torch(tables.BLOOM, {**zeros, "blocks": {**zeros["blocks"], "lora": grads}})
    named = {re.sub(r"(lora_[AB])", r"\1.default", n): value for n, value in named.items() if "lora_" in n}
    file.check_all("grad", named, GRADIENT)
    file.done()
