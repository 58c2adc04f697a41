"""Qwen2, Qwen2.5 and Qwen3 equal the Hugging Face classes, with random parameters of tiny sizes."""

import functools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from ymplug_jax.models import language_model, language_models
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.models.qwen import SIZES, Qwen

OUTPUT, GRADIENT = 1e-5, 1e-4  # relative to the largest value
TINY = Qwen(vocab=53, width=32, depth=2, heads=4, head_dim=8, mlp=44, rope_theta=1e4, max_positions=None)
SHAPES = {
    "qwen2": TINY.clone(kv_heads=4, tied=False),
    "qwen2.5": TINY.clone(kv_heads=2),
    "qwen3": TINY.clone(kv_heads=2, head_dim=12, qkv_bias=False, qk_norm=True),
    "qwen3 untied": TINY.clone(kv_heads=1, head_dim=6, qkv_bias=False, qk_norm=True, tied=False, norm_eps=1e-5),
}
COUNTS = {
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
    "bloomz-1b7": 1_722_408_960,
    "bloomz-7b1": 7_069_016_064,
}


@functools.cache
def params_of(lm: LanguageModel) -> dict:
    """Random values for all parameters, norms and biases included."""
    shapes = jax.eval_shape(partial(language_model.init, lm), jax.random.key(0))
    rng = np.random.default_rng(0)

    def value(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return (float(path[-1].key == "scale") + rng.normal(0, 0.2, leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(value, shapes)


def hugging_face(lm: Qwen, params: dict) -> transformers.PreTrainedModel:
    """The Hugging Face model with our parameters, converted here and not by the package."""
    sizes = {
        "vocab_size": lm.vocab, "hidden_size": lm.width, "intermediate_size": lm.mlp, "num_hidden_layers": lm.depth,
        "num_attention_heads": lm.heads, "num_key_value_heads": lm.kv_heads, "rms_norm_eps": lm.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": lm.rope_theta}, "tie_word_embeddings": lm.tied,
        "max_position_embeddings": 64,
    }  # fmt: skip
    if lm.qk_norm:
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=lm.head_dim))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    blocks = params["blocks"]
    weights = {"model.embed_tokens.weight": params["token_embed"], "model.norm.weight": params["norm"]["scale"]}
    weights["lm_head.weight"] = params["token_embed"] if lm.tied else params["head"]["kernel"].T
    for i in range(lm.depth):
        name = f"model.layers.{i}"
        weights[f"{name}.input_layernorm.weight"] = blocks["attn_norm"]["scale"][i]
        weights[f"{name}.post_attention_layernorm.weight"] = blocks["mlp_norm"]["scale"][i]
        for part in "qkv":
            weights[f"{name}.self_attn.{part}_proj.weight"] = blocks["attn"][part]["kernel"][i].reshape(lm.width, -1).T
            if lm.qkv_bias:
                weights[f"{name}.self_attn.{part}_proj.bias"] = blocks["attn"][part]["bias"][i].reshape(-1)
        for part in "qk" if lm.qk_norm else "":
            weights[f"{name}.self_attn.{part}_norm.weight"] = blocks["attn"][f"{part}_norm"]["scale"][i]
        weights[f"{name}.self_attn.o_proj.weight"] = blocks["attn"]["o"]["kernel"][i].reshape(-1, lm.width).T
        for part in ("gate", "up", "down"):
            weights[f"{name}.mlp.{part}_proj.weight"] = blocks["mlp"][part]["kernel"][i].T
    model.load_state_dict({name: torch.tensor(np.array(value)) for name, value in weights.items()}, strict=True)
    return model.eval()


def masks(kind: str) -> np.ndarray:
    """int32[3, 9] with rows of 9, 6 and 4 tokens."""
    lengths, place = np.array([9, 6, 4])[:, None], np.arange(9)
    return {"none": np.ones((3, 9)), "left": place >= 9 - lengths, "right": place < lengths}[kind].astype(np.int32)


def theirs(model: transformers.PreTrainedModel, embeds: np.ndarray, mask: np.ndarray, weigh: np.ndarray) -> list:
    """Hidden states, logits and gradient of the embeddings, with the positions that `generate` uses."""
    given, seen = torch.tensor(embeds, requires_grad=True), torch.tensor(mask)
    at = (seen.cumsum(-1) - 1).clamp(min=0)
    out = model(inputs_embeds=given, attention_mask=seen, position_ids=at, output_hidden_states=True)
    (out.logits * torch.tensor(weigh) * seen[..., None]).sum().backward()
    return [x.detach().numpy() for x in (out.hidden_states[-1], out.logits, given.grad)]


@partial(jax.jit, static_argnums=0)
def ours(lm: LanguageModel, params: dict, embeds: jax.Array, mask: jax.Array | None, weigh: jax.Array) -> tuple:
    def loss(embeds: jax.Array) -> tuple[jax.Array, tuple]:
        hidden = lm.apply({"params": params}, embeds, mask)
        logits = lm.apply({"params": params}, hidden, method="logits")
        seen = 1 if mask is None else mask[..., None]
        return jnp.sum(logits * weigh * seen), (hidden, logits)

    (_, out), grad = jax.value_and_grad(loss, has_aux=True)(embeds)
    return *out, grad


def agree(found: jax.Array, wanted: np.ndarray, tolerance: float) -> None:
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_equal_hugging_face(name: str) -> None:
    lm, rng = SHAPES[name], np.random.default_rng(1)
    params = params_of(lm)
    model = hugging_face(lm, params)
    embeds, weigh = rng.normal(size=(3, 9, 32)).astype(np.float32), rng.normal(size=(3, 9, 53)).astype(np.float32)
    ids = rng.integers(0, 53, (3, 9))
    with torch.no_grad():
        tokens = model.get_input_embeddings()(torch.tensor(ids)).numpy()
    np.testing.assert_array_equal(lm.apply({"params": params}, ids, method="embed"), tokens)
    for kind in ("none", "left", "right") if name == "qwen2" else ("left", "right"):
        mask = masks(kind)
        found = ours(lm, params, embeds, None if kind == "none" else mask, weigh)
        wanted = theirs(model, embeds, mask, weigh)
        for ours_, theirs_, tolerance in zip(found, wanted, (OUTPUT, OUTPUT, GRADIENT), strict=True):
            assert np.isfinite(ours_).all()
            agree(np.asarray(ours_)[mask == 1], theirs_[mask == 1], tolerance)
        assert not np.asarray(found[2])[mask == 0].any()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_of_the_released_models(name: str) -> None:
    shapes = jax.eval_shape(partial(language_model.init, language_models.SIZES[name]), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == COUNTS[name]


def test_initial_values() -> None:
    lm = SIZES["qwen-tiny"].clone(tied=False, qkv_bias=True)
    leaves = jax.tree.leaves_with_path(jax.jit(partial(language_model.init, lm))(jax.random.key(0)))
    for path, leaf in leaves:
        kind = path[-1].key
        if kind in ("scale", "bias"):
            np.testing.assert_array_equal(leaf, float(kind == "scale"))
        else:
            assert leaf.std() == pytest.approx(0.02, rel=0.05), path
        assert leaf.dtype == jnp.float32


def test_remat_changes_nothing() -> None:
    lm, rng = SHAPES["qwen3"], np.random.default_rng(2)
    params = params_of(lm)
    given = (
        rng.normal(size=(3, 9, 32)).astype(np.float32),
        masks("left"),
        rng.normal(size=(3, 9, 53)).astype(np.float32),
    )
    expected = ours(lm, params, *given)
    for remat in ("full", "dots"):
        jax.tree.map(
            partial(np.testing.assert_allclose, atol=1e-4), ours(lm.clone(remat=remat), params, *given), expected
        )


def test_bfloat16_is_close_to_float32() -> None:
    lm, rng = SHAPES["qwen3 untied"], np.random.default_rng(3)
    given = (
        rng.normal(size=(3, 9, 32)).astype(np.float32),
        masks("left"),
        rng.normal(size=(3, 9, 53)).astype(np.float32),
    )
    low = lm.clone(dtype="bfloat16")
    hidden, logits, grad = ours(low, params_of(lm), *given)
    assert (hidden.dtype, logits.dtype, grad.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    exact = ours(lm, params_of(lm), *given)
    agree(np.asarray(logits)[given[1] == 1], np.asarray(exact[1])[given[1] == 1], 0.05)
    _, past = jax.eval_shape(lambda: low.apply({"params": params_of(lm)}, given[0], given[1], method="prefill"))
    assert past.cache.k.dtype == jnp.bfloat16 and past.cache.k.shape == (3, 2, 1, 9, 6)


def test_every_leaf_has_one_axis_rule_and_every_rule_a_leaf() -> None:
    used: dict[str, set[str]] = {}
    adapted = SIZES["qwen-tiny"].clone(lora_rank=2, lora_targets=("attn/.*", "mlp/.*"))
    for lm in (*SHAPES.values(), SIZES["qwen-tiny"], adapted):
        rules = language_models.axes_of(lm)
        for path, leaf in jax.tree.leaves_with_path(params_of(lm)):
            name = "/".join(part.key for part in path)
            found = [(pattern, words) for pattern, words in rules if re.fullmatch(pattern, name)]
            assert len(found) == 1 and len(found[0][1].split()) == leaf.ndim, name
            used.setdefault(found[0][0], set()).add(name)
    assert used.keys() == {pattern for pattern, _ in language_models.axes_of(TINY)}


@pytest.mark.parametrize("name", language_models.SIZES)
def test_every_decoder_follows_the_protocol(name: str) -> None:
    lm = language_models.SIZES[name]
    assert isinstance(lm, LanguageModel)
    assert language_models.KINDS[language_models.kind_of(lm)] is type(lm)
