"""Conversion rules: names and shapes of the released checkpoints, exact round trips, and errors in rules."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trees
from ymplug_jax.convert import mplug_video as tables
from ymplug_jax.convert import rules
from ymplug_jax.convert.rules import Rule
from ymplug_jax.models import mplug_video
from ymplug_jax.models.mplug_video import MPLUGVideo, sized


def shapes(model: MPLUGVideo) -> dict:
    return jax.eval_shape(partial(mplug_video.init, model), jax.random.key(0))


@pytest.fixture(scope="module")
def like() -> dict:
    return shapes(sized("tiny", "tiny", queries=4, contrastive_width=8, classes=3).clone(connector_norm=True))


def checkpoint(like: dict, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Random values for every source tensor."""
    entries = rules.expand(tables.MPLUG_VIDEO, like)
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=entry.shape).astype(jnp.dtype(dtype)) for name, entry in entries.items()}


def test_names_and_shapes_of_the_release() -> None:
    entries = rules.expand(tables.MPLUG_VIDEO, shapes(sized("1.3b", "b16")))
    assert len(entries) == 583
    lm = "text_decoder.dist_model.language_model"
    expected = {
        "learnable_queries": (1, 128, 768),
        "visual_encoder.cls_token": (1, 1, 768),
        "visual_encoder.pos_embed": (1, 197, 768),
        "visual_encoder.temporal_embed": (1, 4, 768),
        "visual_encoder.patch_embed.proj.weight": (768, 3, 16, 16),
        "visual_encoder.blocks.11.temporal_attn.qkv.weight": (2304, 768),
        "visual_encoder.blocks.0.attn.q_bias": (768,),
        "visual_encoder.blocks.3.mlp.fc2.weight": (768, 3072),
        "attn_pool.attn.in_proj_weight": (2304, 768),
        "attn_pool.attn.in_proj_bias": (2304,),
        "attn_pool.attn.bias_v": (1, 1, 768),
        "visual_fc.weight": (2048, 768),
        f"{lm}.embedding.word_embeddings.weight": (51200, 2048),
        f"{lm}.encoder.layers.23.self_attention.query_key_value.weight": (6144, 2048),
        f"{lm}.encoder.layers.23.self_attention.query_key_value.bias": (6144,),
        f"{lm}.encoder.layers.0.mlp.dense_h_to_4h.weight": (8192, 2048),
        f"{lm}.encoder.final_layernorm.bias": (2048,),
    }
    assert {name: entries[name].shape for name in expected} == expected
    entries = rules.expand(tables.MPLUG_VIDEO, shapes(sized("2.7b", "l14", contrastive_width=256)))
    assert entries["temp"].shape == () and entries["text_proj.weight"].shape == (256, 2560)
    assert entries[f"{lm}.encoder.layers.31.self_attention.query_key_value.weight"].shape == (7680, 2560)
    assert len(rules.expand(tables.MPLUG_VIDEO, shapes(sized("1.3b", "b16", contrastive_width=256)))) == 588


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_exact(like: dict, dtype: str) -> None:
    tensors = checkpoint(like, dtype)
    tree = trees.to_tree(tables.MPLUG_VIDEO, tensors, like)
    jax.tree.map(lambda leaf, wanted: np.testing.assert_equal(leaf.shape, wanted.shape), tree, like)
    back = rules.to_torch(tables.MPLUG_VIDEO, tree)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and back[name].tobytes() == tensor.tobytes(), name


def test_tensors_can_come_one_by_one_in_any_order(like: dict) -> None:
    tensors = checkpoint(like)
    whole = trees.to_tree(tables.MPLUG_VIDEO, tensors, like)
    entries = rules.expand(tables.MPLUG_VIDEO, like)
    for name in reversed(tensors):
        for path, layer, value in rules.pieces(entries[name], tensors[name]):
            leaf = whole
            for part in path.split("/"):
                leaf = leaf[part]
            np.testing.assert_array_equal(leaf if layer is None else leaf[layer], value)


def test_heads_of_the_language_model_are_interleaved(like: dict) -> None:
    heads, size = like["llm"]["blocks"]["attn"]["q"]["bias"].shape[1:]
    tensors = checkpoint(like)
    bias = tensors["text_decoder.dist_model.language_model.encoder.layers.1.self_attention.query_key_value.bias"]
    attn = trees.to_tree(tables.MPLUG_VIDEO, tensors, like)["llm"]["blocks"]["attn"]
    for n in range(heads):
        for i, part in enumerate("qkv"):
            first = (3 * n + i) * size
            np.testing.assert_array_equal(attn[part]["bias"][1, n], bias[first : first + size])


def test_what_does_not_fit_is_listed(like: dict) -> None:
    tensors = checkpoint(like)
    del tensors["visual_encoder.blocks.1.norm1.weight"], tensors["temp"]
    tensors["text_decoder.extra.bias"] = np.zeros(3)
    tensors["visual_fc.bias"] = np.zeros(7)
    entries = rules.expand(tables.MPLUG_VIDEO, like)
    mismatch = rules.compare(entries, {name: tensor.shape for name, tensor in tensors.items()})
    assert mismatch.missing == ["temp", "visual_encoder.blocks.1.norm1.weight"]
    assert mismatch.unexpected == ["text_decoder.extra.bias"]
    assert mismatch.reshaped == ["visual_fc.bias: expected (96,), found (7,)"]
    with pytest.raises(
        ValueError, match=r"missing: temp, .*unexpected: text_decoder.extra.bias; reshaped: visual_fc.bias"
    ):
        trees.to_tree(tables.MPLUG_VIDEO, tensors, like)


def test_a_table_must_make_every_parameter_once() -> None:
    leaf = jax.ShapeDtypeStruct((4,), jnp.float32)
    first = Rule("a", "d -> d", ("a",))
    with pytest.raises(ValueError, match="no rule makes the parameter 'b'"):
        rules.expand([first], {"a": leaf, "b": leaf})
    with pytest.raises(ValueError, match="made by two rules"):
        rules.expand([first, Rule("z", "d -> d", ("a",))], {"a": leaf})
    with pytest.raises(ValueError, match="do not all exist"):
        rules.expand([Rule("ab", "(part d) -> d", ("a", "b"))], {"a": leaf})
    with pytest.raises(ValueError, match="has 2 axes but"):
        rules.expand([Rule("a", "out in -> in out", ("a",))], {"a": leaf})
