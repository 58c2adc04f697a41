"""Parameter counts, axis rules, initialisation, remat, precision and masks of mPLUG-video."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ymplug_jax.models import language_models, mplug_video
from ymplug_jax.models.mplug_video import MPLUGVideo, sized
from ymplug_jax.tasks.common import losses

# Total and trainable parameters of the reference classes for each of SIZES, by the parts that a task adds.
SIZES = [("1.3b", "b16"), ("1.3b", "l14"), ("2.7b", "b16"), ("2.7b", "l14")]
PRETRAIN = [
    (1_447_656_704, 130_002_176),
    (1_761_620_992, 443_966_464),
    (2_784_363_264, 130_395_904),
    (3_098_458_624, 444_491_264),
]
CONTRASTIVE = [
    (1_448_378_113, 130_723_585),
    (1_762_407_937, 444_753_409),
    (2_785_215_745, 131_248_385),
    (3_099_376_641, 445_409_281),
]
CLASSIFY = [
    (1_451_948_333, 134_293_805),
    (1_765_913_645, 448_259_117),
    (2_791_037_741, 137_070_381),
    (3_105_134_125, 451_166_765),
]
CAPTION = [
    (1_447_665_920, 130_011_392),
    (1_761_633_280, 443_978_752),
    (2_784_372_480, 130_405_120),
    (3_098_470_912, 444_503_552),
]
MATCH = [
    (1_451_857_154, 134_202_626),
    (1_765_821_442, 448_166_914),
    (2_790_924_546, 136_957_186),
    (3_105_019_906, 451_052_546),
]
TASKS = {
    "pretrain": ({}, PRETRAIN),
    "contrastive": ({"contrastive_width": 256}, CONTRASTIVE),
    "classify": ({"frames": 8, "classes": 45}, CLASSIFY),
    "caption": ({"frames": 16}, CAPTION),
    "match": ({"classes": 2}, MATCH),
}
COUNTS = [
    (*size, fields, counts) for fields, column in TASKS.values() for size, counts in zip(SIZES, column, strict=True)
]


def small(depth: int = 3, **fields: object) -> MPLUGVideo:
    model = sized("tiny", "tiny", queries=4, contrastive_width=8, classes=3)
    vision = model.vision.clone(image_size=32, frames=2, width=24, heads=3, depth=depth)
    llm = model.llm.clone(vocab=60, width=32, heads=2, max_positions=24, depth=depth)
    return model.clone(vision=vision, abstractor=model.abstractor.clone(heads=3), llm=llm, **fields)


def shapes(model: MPLUGVideo) -> dict:
    return flatten_dict(jax.eval_shape(partial(mplug_video.init, model), jax.random.key(0)), sep="/")


def weights(model: MPLUGVideo) -> dict:
    """Random values for all parameters, because parameters that start at zero would hide errors."""
    rng = np.random.default_rng(0)
    around = {"scale": 1.0, "temperature": 0.3}
    flat = {}
    for path, leaf in shapes(model).items():
        noise = 0.0 if path == "temperature" else rng.normal(0, 0.1, leaf.shape)
        flat[path] = np.asarray(around.get(path.rpartition("/")[2], 0.0) + noise, np.float32)
    return unflatten_dict(flat, sep="/")


def batch(model: MPLUGVideo, rows: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    size, frames = model.vision.image_size, model.vision.frames
    video = rng.normal(size=(rows, frames, size, size, 3)).astype(np.float32)
    ids = rng.integers(0, model.llm.vocab, (rows, 7)).astype(np.int32)
    mask = (np.arange(7) < np.array([7, 5, 6, 3])[:rows, None]).astype(np.int32)
    return video, ids, mask


def test_adapters_of_the_language_model_are_trained() -> None:
    model = sized("bloom-tiny", "tiny")
    leaves = shapes(model.clone(llm=model.llm.clone(lora_rank=2)))
    trained = {path for path in leaves if not any(re.fullmatch(pattern, path) for pattern in mplug_video.FROZEN)}
    of_llm = {path for path in trained if path.startswith("llm/")}
    assert of_llm == {f"llm/blocks/lora/qkv/{name}" for name in "aqkv"}


@pytest.mark.parametrize(("llm", "vision", "fields", "counts"), COUNTS)
def test_parameter_counts(llm: str, vision: str, fields: dict, counts: tuple[int, int]) -> None:
    leaves = shapes(sized(llm, vision, **fields))
    frozen = {path for path in leaves if any(re.fullmatch(pattern, path) for pattern in mplug_video.FROZEN)}
    total = sum(int(np.prod(leaf.shape)) for leaf in leaves.values())
    trainable = sum(int(np.prod(leaf.shape)) for path, leaf in leaves.items() if path not in frozen)
    assert (total, trainable) == counts


def test_every_leaf_has_one_axis_rule_and_every_rule_a_leaf() -> None:
    plain = sized("tiny", "tiny", queries=4)
    variants = [plain, small(connector_norm=True), plain.clone(vision=plain.vision.clone(clip=False))]
    lms = language_models.SIZES
    decoders = [
        lms["bloom-tiny"].clone(lora_rank=2),
        lms["bloom-tiny"].clone(lora_rank=2, lora_targets=("attn/.*", "mlp/.*")),
        lms["qwen-tiny"].clone(lora_rank=2, lora_targets=("attn/.*", "mlp/.*")),
        lms["tiny"].clone(lora_rank=2, lora_targets=("attn/.*", "mlp/.*")),
        lms["qwen-tiny"],
        lms["qwen-tiny"].clone(qkv_bias=True, tied=False),
    ]
    variants += [plain.clone(llm=lm) for lm in decoders]
    used = set()
    for model in variants:
        for path, leaf in shapes(model).items():
            found = [(pattern, words) for pattern, words in mplug_video.axes_of(model) if re.fullmatch(pattern, path)]
            assert len(found) == 1, f"{path} matches {found}"
            assert len(found[0][1].split()) == len(leaf.shape), f"{path} {leaf.shape} {found[0][1]}"
            used.add(found[0][0])
    assert used == {pattern for model in variants for pattern, _ in mplug_video.axes_of(model)}


def test_initial_values() -> None:
    model = sized("tiny", "tiny", queries=16, contrastive_width=32)
    model = model.clone(vision=model.vision.clone(depth=8))
    params = flatten_dict(jax.jit(partial(mplug_video.init, model))(jax.random.key(3)), sep="/")
    std = {path: float(leaf.std()) for path, leaf in params.items()}
    for path in ("temporal_embed", "blocks/temporal_fc/kernel", "blocks/temporal_fc/bias", "blocks/attn/q/bias"):
        assert not params[f"vision/{path}"].any(), path
    for path in ("cls", "pos_embed", "patch/kernel", "blocks/attn/q/kernel", "blocks/temporal_attn/o/kernel"):
        assert std[f"vision/{path}"] == pytest.approx(0.015, rel=0.25 if path == "cls" else 0.05), path
    for path in ("attn/o/kernel", "mlp/down/kernel"):
        by_layer = params[f"vision/blocks/{path}"].reshape(8, -1).std(axis=1)
        np.testing.assert_allclose(by_layer, 0.015 / np.sqrt(2 * np.arange(1, 9)), rtol=0.06)
    assert std["connector/proj/kernel"] == pytest.approx(0.015, rel=0.05)
    assert std["abstractor/queries"] == pytest.approx(0.015, rel=0.05)
    width = model.vision.width
    for path in ("abstractor/attn/o/kernel", "abstractor/mlp/up/bias", "connector/proj/bias", "vision_proj/kernel"):
        assert np.abs(params[path]).max() == pytest.approx(width**-0.5, rel=0.1), path
    assert np.abs(params["abstractor/mlp/down/bias"]).max() == pytest.approx((4 * width) ** -0.5, rel=0.1)
    assert np.abs(params["abstractor/attn/k/kernel"]).max() == pytest.approx((6 / (4 * width)) ** 0.5, rel=0.1)
    assert std["abstractor/extra_key"] == pytest.approx(width**-0.5, rel=0.3)
    assert not params["abstractor/attn/o/bias"].any()
    assert params["temperature"] == np.float32(0.07)
    assert std["llm/blocks/attn/q/kernel"] == pytest.approx(0.02, rel=0.05)
    assert std["llm/blocks/mlp/down/kernel"] == pytest.approx(0.02 / np.sqrt(2 * model.llm.depth), rel=0.05)


def loss(model: MPLUGVideo, params: dict, video: jax.Array, ids: jax.Array, mask: jax.Array) -> jax.Array:
    out = model.apply({"params": params}, video, ids, mask)
    total, weight = losses.next_token(out["logits"], ids, mask)
    feats = out["contrastive"]
    pair, rows = losses.contrastive(feats["video"], feats["text"], feats["temperature"])
    return total / weight + pair / rows


@pytest.fixture(scope="module")
def plain() -> tuple:
    """Model, parameters, batch, and the loss with its gradients."""
    model = small()
    params, data = weights(model), batch(model)
    return model, params, data, jax.jit(jax.value_and_grad(partial(loss, model)))(params, *data)


def test_remat_changes_nothing(plain) -> None:
    model, params, data, expected = plain
    variant = model.clone(vision=model.vision.clone(remat="full"), llm=model.llm.clone(remat="dots"))
    found = jax.jit(jax.value_and_grad(partial(loss, variant)))(params, *data)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), found, expected)


def test_bfloat16_is_finite_and_near_float32(plain) -> None:
    model, params, data, (expected, _) = plain
    low = model.clone(
        vision=model.vision.clone(dtype="bfloat16"),
        abstractor=model.abstractor.clone(dtype="bfloat16"),
        llm=model.llm.clone(dtype="bfloat16"),
    )
    llm = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params["llm"])  # frozen weights are stored in bfloat16
    trainable = {name: tree for name, tree in params.items() if name != "llm"}

    out = jax.eval_shape(lambda: low.apply({"params": trainable | {"llm": llm}}, *data))
    assert out["prefix"].dtype == out["hidden"].dtype == jnp.bfloat16
    assert out["logits"].dtype == out["contrastive"]["video"].dtype == jnp.float32
    step = jax.jit(jax.value_and_grad(lambda trainable: loss(low, trainable | {"llm": llm}, *data)))
    value, grads = step(trainable)
    assert value == pytest.approx(float(expected), rel=0.03)
    assert all(np.isfinite(leaf).all() and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(grads))


def test_scanned_layers_are_the_layers_in_order() -> None:
    lm = small(depth=2).llm
    params = weights(small(depth=2))["llm"]
    embeds = np.random.default_rng(0).normal(size=(2, 5, lm.width)).astype(np.float32)
    whole = jax.jit(lambda params: lm.apply({"params": params}, embeds))

    def run_one(params: dict, layer: int, embeds: jax.Array) -> tuple[jax.Array, jax.Array]:
        one = params | {"blocks": jax.tree.map(lambda leaf: leaf[layer : layer + 1], params["blocks"])}
        hidden, kept = lm.clone(depth=1).apply(
            {"params": one}, embeds, capture_intermediates=True, mutable="intermediates"
        )
        return hidden, kept["intermediates"]["blocks"]["__call__"][0][0][0][0]

    def one_by_one(params: dict) -> jax.Array:
        _, between = run_one(params, 0, embeds)
        return run_one(params | {"pos_embed": jnp.zeros_like(params["pos_embed"])}, 1, between)[0]

    np.testing.assert_allclose(jax.jit(one_by_one)(params), whole(params), atol=1e-5)


def test_padding_and_later_tokens_are_masked(plain) -> None:
    model, params, (video, ids, mask), _ = plain
    queries = model.abstractor.queries

    @jax.jit
    def read(ids: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        run = model.bind({"params": params})
        out = run.encode_video(video)
        text_only = run.hidden(None, ids)
        return run.hidden(out["prefix"], ids), text_only, run.contrastive(out["image_query"], text_only, mask)["text"]

    hidden, text_only, text = read(ids)
    other_hidden, _, other_text = read(np.where(mask == 1, ids, (ids + 1) % model.llm.vocab))
    length = queries + int(mask.sum(axis=1).min())
    np.testing.assert_array_equal(other_hidden[:, :length], hidden[:, :length])
    np.testing.assert_array_equal(other_text, text)
    np.testing.assert_allclose(np.linalg.norm(text, axis=-1), 1, rtol=1e-5)
    assert np.abs(text_only[:, 0] - hidden[:, queries]).max() > 1e-3  # the visual prefix has an effect


def test_dropout_needs_deterministic_false(plain) -> None:
    model, params, (_, ids, _), _ = plain
    lm = model.llm.clone(dropout=0.1)
    embeds = params["llm"]["token_embed"][ids]

    @jax.jit
    def drop(key: jax.Array) -> jax.Array:
        return lm.apply({"params": params["llm"]}, embeds, deterministic=False, rngs={"dropout": key})

    off = jax.jit(lambda: lm.apply({"params": params["llm"]}, embeds))()
    np.testing.assert_array_equal(jax.jit(lambda: model.llm.apply({"params": params["llm"]}, embeds))(), off)
    drawn = [drop(jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - off).max() > 1e-2 and np.abs(drawn[0] - drawn[2]).max() > 1e-2


def test_wrong_sizes_raise() -> None:
    model = small()
    video, ids, mask = batch(model)

    def trace(model: MPLUGVideo, *args: np.ndarray) -> None:
        jax.eval_shape(lambda: model.init(jax.random.key(0), *args))

    with pytest.raises(ValueError, match="vision tower expects"):
        trace(model, video[:, :1], ids, mask)
    with pytest.raises(ValueError, match="max_positions"):
        trace(model, video, np.zeros((2, 25), np.int32), mask)
    with pytest.raises(ValueError, match="remat"):
        trace(model.clone(llm=model.llm.clone(remat="some")), video, ids, mask)
    with pytest.raises(ValueError, match="unknown"):
        sized("7b", "b16")
