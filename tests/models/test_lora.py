"""Adapters of every decoder: merged by hand, counted, cached, and refused where a target cannot have one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ymplug_jax.core import quantize
from ymplug_jax.models import language_model, language_models, lora
from ymplug_jax.models.language_model import LanguageModel

ALL = ("attn/.*", "mlp/.*")
TINY = {"gpt3": "tiny", "bloom": "bloom-tiny", "qwen": "qwen-tiny"}
# einsum of the factors a and b -> the kernel of the layer
PRODUCTS = {
    "q": "ldr,lrnh->ldnh",
    "k": "ldr,lrnh->ldnh",
    "v": "ldr,lrnh->ldnh",
    "o": "lnhr,lrd->lnhd",
    "gate": "ldr,lrm->ldm",
    "up": "ldr,lrm->ldm",
    "down": "lmr,lrd->lmd",
}


def decoder(kind: str, **fields) -> LanguageModel:
    return language_models.SIZES[TINY[kind]].clone(lora_rank=3, lora_scale=0.5, **fields)


def filled(model: LanguageModel, seed: int = 0) -> dict:
    """Parameters with random adapters, which would start at zero."""
    params, rng = flatten_dict(language_model.init(model, jax.random.key(seed)), sep="/"), np.random.default_rng(seed)
    for path, leaf in params.items():
        if "/lora/" in path:
            params[path] = jnp.asarray(rng.normal(scale=0.1, size=leaf.shape), jnp.float32)
    return unflatten_dict(params, sep="/")


def merged(params: dict, scale: float) -> dict:
    """W + scale * A B by hand, in float64, without the adapters."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(params, sep="/").items()}
    for name, product in PRODUCTS.items():
        part = "attn" if name in "qkvo" else "mlp"
        fused = f"blocks/lora/qkv/{name}"
        a, b = ("blocks/lora/qkv/a", fused) if fused in flat else (f"blocks/lora/{name}/a", f"blocks/lora/{name}/b")
        if b in flat:
            flat[f"blocks/{part}/{name}/kernel"] += scale * np.einsum(product, flat[a], flat[b])
    return unflatten_dict({p: jnp.asarray(v, jnp.float32) for p, v in flat.items() if "/lora/" not in p}, sep="/")


def logits(model: LanguageModel, params: dict, ids: np.ndarray, **how) -> jax.Array:
    def run(lm: LanguageModel) -> jax.Array:
        return lm.logits(lm(lm.embed(ids), **how))

    with jax.default_matmul_precision("highest"):
        return model.apply({"params": params}, method=run, rngs={"dropout": jax.random.key(7)})


@pytest.mark.parametrize("targets", [("attn/[qkv]",), ALL])
@pytest.mark.parametrize("kind", TINY)
def test_adapters_equal_merged_weights(kind: str, targets: tuple[str, ...]) -> None:
    model = decoder(kind, lora_targets=targets)
    params, ids = filled(model), np.arange(2, 16).reshape(2, 7)
    with_adapters = logits(model, params, ids)
    plain = model.clone(lora_rank=0)
    expected = logits(plain, merged(params, 0.5), ids)
    assert np.abs(with_adapters - expected).max() <= 1e-5 * np.abs(expected).max()
    without = {**params, "blocks": {k: v for k, v in params["blocks"].items() if k != "lora"}}
    assert np.abs(with_adapters - logits(plain, without, ids)).max() > 1e-2


@pytest.mark.parametrize("kind", TINY)
def test_merging_is_exact_and_undone_bit_for_bit(kind: str) -> None:
    """Merged weights are W + scale * A B, rounded once to the type of W; the others and the unmerged tree are untouched."""
    params = filled(decoder(kind, lora_targets=ALL))
    flat = flatten_dict(params, sep="/")
    half = {path: leaf if "/lora/" in path else leaf.astype(jnp.bfloat16) for path, leaf in flat.items()}
    for given, tolerance in ((flat, 1e-6), (half, 2**-8)):
        whole, kept = lora.merge(unflatten_dict(given, sep="/"), 0.5)
        found, expected = (flatten_dict(tree, sep="/") for tree in (whole, merged(unflatten_dict(given, sep="/"), 0.5)))
        assert found.keys() == expected.keys()
        for path, leaf in found.items():
            assert leaf.dtype == given[path].dtype
            np.testing.assert_allclose(
                np.asarray(leaf, np.float32),
                np.asarray(expected[path], np.float32),
                rtol=tolerance,
                atol=tolerance / 10,
            )
        back = flatten_dict(lora.unmerge(whole, kept), sep="/")
        assert back.keys() == given.keys()
        for path, leaf in back.items():
            assert leaf.dtype == given[path].dtype
            np.testing.assert_array_equal(leaf, given[path])
    held = quantize.hold(params, language_models.axes_of(decoder(kind)))
    with pytest.raises(ValueError, match="cannot be merged into int8 weights"):
        lora.merge(held, 0.5)


@pytest.mark.parametrize("kind", TINY)
def test_fresh_adapters_change_nothing(kind: str) -> None:
    model = decoder(kind, lora_targets=ALL)
    params, ids = language_model.init(model, jax.random.key(0)), np.arange(2, 9)[None]
    without = {**params, "blocks": {k: v for k, v in params["blocks"].items() if k != "lora"}}
    np.testing.assert_array_equal(logits(model, params, ids), logits(model.clone(lora_rank=0), without, ids))


@pytest.mark.parametrize("kind", TINY)
def test_cached_reading_has_the_adapters(kind: str) -> None:
    model = decoder(kind, lora_targets=ALL)
    params, ids = filled(model), np.arange(2, 9)[None]

    def run(lm: LanguageModel) -> jax.Array:
        _, past = lm.prefill(lm.embed(ids[:, :4]))
        hidden, _ = lm.branch(lm.embed(ids[:, None, 4:]), past, lm.open_branches(1, 1, 3))
        return lm.logits(hidden[:, 0])

    with jax.default_matmul_precision("highest"):
        cached = model.apply({"params": params}, method=run)
    expected = logits(model, params, ids)[:, 4:]
    assert np.abs(cached - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("kind", "remat"), [("gpt3", "none"), ("bloom", "full"), ("qwen", "full")])
def test_dropout_acts_in_training_only(kind: str, remat: str) -> None:
    model = decoder(kind, lora_targets=ALL, lora_dropout=0.5, remat=remat)
    params, ids = filled(model), np.arange(2, 9)[None]
    still = logits(model.clone(lora_dropout=0.0), params, ids, deterministic=False)
    np.testing.assert_array_equal(logits(model, params, ids), logits(model.clone(lora_dropout=0.0), params, ids))
    assert np.abs(logits(model, params, ids, deterministic=False) - still).max() > 1e-3


@pytest.mark.parametrize(
    ("targets", "trained"),
    [(("attn/[qkv]",), 3_932_160), (ALL, 15_728_640)],
)
def test_counts_of_bloomz_7b1(targets: tuple[str, ...], trained: int) -> None:
    """Rank 8: 30 layers of 8 * (4096 + 12288), and with dense, up and down of 8 * (8192 + 20480 + 20480) more."""
    model = language_models.SIZES["bloomz-7b1"].clone(lora_rank=8, lora_targets=targets)
    like = jax.eval_shape(lambda: language_model.init(model, jax.random.key(0)))
    assert sum(leaf.size for path, leaf in flatten_dict(like, sep="/").items() if "/lora/" in path) == trained


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("bloom", ("attn/q",), "keeps q, k and v in one matrix; write 'attn/\\[qkv\\]'"),
        ("gpt3", ("mlp/gate",), "'mlp/gate' matches no linear layer; choose one of attn/q, attn/k"),
        ("qwen", (), "lora_targets: empty; choose one of attn/q"),
        ("gpt3", ("(",), "lora_targets: '\\(' is not a regex"),
    ],
)
def test_targets_without_a_layer_are_refused(kind: str, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        language_model.init(decoder(kind, lora_targets=targets), jax.random.key(0))


@pytest.mark.parametrize("kind", TINY)
def test_frozen_adapters_may_be_quantised(kind: str) -> None:
    model = decoder(kind, lora_targets=ALL)
    params, ids = filled(model), np.arange(6)[None]
    np.testing.assert_allclose(
        logits(model, quantize.hold(params, language_models.axes_of(model)), ids), logits(model, params, ids), atol=0.1
    )


def test_qwen_may_adapt_queries_and_values_alone() -> None:
    model = decoder("qwen", lora_targets=("attn/[qv]",))
    paths = flatten_dict(language_model.init(model, jax.random.key(0)), sep="/")
    found = {path.removeprefix("blocks/lora/") for path in paths if "/lora/" in path}
    assert found == {"q/a", "q/b", "v/a", "v/b"}
