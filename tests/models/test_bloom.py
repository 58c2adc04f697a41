"""BLOOM equals the Hugging Face class, with random parameters of a tiny size and padding on either side."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from tests.models.test_qwen import GRADIENT, OUTPUT, agree, masks, ours, params_of, theirs
from ymplug_jax.models import decode, language_model, language_models
from ymplug_jax.models.bloom import Bloom


class Model(torch.nn.Module):
    """BloomForCausalLM without the argument `position_ids`, since it counts positions from the mask."""

    def __init__(self, inner: transformers.BloomForCausalLM) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, position_ids: torch.Tensor, **given: torch.Tensor) -> object:
        return self.inner(**given)


def hugging_face(lm: Bloom, params: dict) -> Model:
    config = transformers.BloomConfig(vocab_size=lm.vocab, hidden_size=lm.width, n_layer=lm.depth, n_head=lm.heads)
    model = transformers.BloomForCausalLM(config)
    blocks, attn, size = params["blocks"], params["blocks"]["attn"], lm.width // lm.heads
    weights = {"transformer.word_embeddings.weight": params["token_embed"], "lm_head.weight": params["token_embed"]}
    for name, ours_ in (("word_embeddings_layernorm", params["embed_norm"]), ("ln_f", params["norm"])):
        weights |= {f"transformer.{name}.weight": ours_["scale"], f"transformer.{name}.bias": ours_["bias"]}
    for i in range(lm.depth):
        name = f"transformer.h.{i}"
        for theirs_, norm in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "mlp_norm")):
            weights[f"{name}.{theirs_}.weight"] = blocks[norm]["scale"][i]
            weights[f"{name}.{theirs_}.bias"] = blocks[norm]["bias"][i]
        fused = np.stack([attn[part]["kernel"][i] for part in "qkv"], axis=2)  # [D, N, 3, H]
        weights[f"{name}.self_attention.query_key_value.weight"] = fused.reshape(lm.width, -1).T
        bias = np.stack([attn[part]["bias"][i] for part in "qkv"], axis=1)  # [N, 3, H]
        weights[f"{name}.self_attention.query_key_value.bias"] = bias.reshape(-1)
        weights[f"{name}.self_attention.dense.weight"] = attn["o"]["kernel"][i].reshape(lm.heads * size, -1).T
        weights[f"{name}.self_attention.dense.bias"] = attn["o"]["bias"][i]
        for theirs_, part in (("dense_h_to_4h", "up"), ("dense_4h_to_h", "down")):
            weights[f"{name}.mlp.{theirs_}.weight"] = blocks["mlp"][part]["kernel"][i].T
            weights[f"{name}.mlp.{theirs_}.bias"] = blocks["mlp"][part]["bias"][i]
    model.load_state_dict({name: torch.tensor(np.array(value)) for name, value in weights.items()}, strict=True)
    return Model(model.eval())


@pytest.mark.parametrize("heads", [4, 6])  # 6 is not a power of two, so the slopes come from two series
def test_outputs_and_gradients_equal_hugging_face(heads: int) -> None:
    lm, rng = Bloom(vocab=53, width=48, depth=2, heads=heads), np.random.default_rng(1)
    params = params_of(lm)
    model = hugging_face(lm, params)
    ids = rng.integers(0, 53, (3, 9))
    with torch.no_grad():
        tokens = model.inner.transformer.word_embeddings_layernorm(
            model.inner.get_input_embeddings()(torch.tensor(ids))
        )
    agree(np.asarray(lm.apply({"params": params}, ids, method="embed")), tokens.numpy(), OUTPUT)
    # Hugging Face normalises all inputs. Ours leaves visual vectors unnormalised, so the norm is removed there.
    model.inner.transformer.word_embeddings_layernorm = torch.nn.Identity()
    embeds, weigh = rng.normal(size=(3, 9, 48)).astype(np.float32), rng.normal(size=(3, 9, 53)).astype(np.float32)
    for kind in ("none", "left", "right") if heads == 4 else ("left", "right"):
        mask = masks(kind)
        found = ours(lm, params, embeds, None if kind == "none" else mask, weigh)
        wanted = theirs(model, embeds, mask, weigh)
        for ours_, theirs_, tolerance in zip(found, wanted, (OUTPUT, OUTPUT, GRADIENT), strict=True):
            assert np.isfinite(ours_).all()
            agree(np.asarray(ours_)[mask == 1], theirs_[mask == 1], tolerance)
        assert not np.asarray(found[2])[mask == 0].any()


def test_generation_from_a_tree_per_layer_is_the_same() -> None:
    lm = Bloom(vocab=50, width=16, depth=3, heads=2, lora_rank=2)
    params = jax.jit(partial(language_model.init, lm))(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = jax.tree.map(lambda leaf: jax.random.normal(next(keys), leaf.shape) * 0.3, params)  # layers differ
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 50, (2, 5)))

    @jax.jit
    def run(params: dict) -> tuple[jax.Array, jax.Array]:
        embeds, mask = decode.prompt_of(lm, params, None, ids, jnp.array([5, 3]))
        state = decode.start(lm, params, embeds, mask, 1)
        logits = decode.advance(lm, params, state, ids[:, :1]).logits
        return decode.greedy(lm, params, embeds, mask, new_tokens=6, eos=-1).ids, logits

    split = language_models.for_steps(lm, params)
    assert split["blocks"]["2"]["mlp"]["up"]["kernel"].shape == (16, 64)
    stacked, separate = run(params), run(split)
    np.testing.assert_array_equal(stacked[0], separate[0])
    np.testing.assert_allclose(stacked[1], separate[1], rtol=1e-5, atol=1e-5)
