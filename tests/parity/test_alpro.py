"""The parts of ALPRO against stored outputs of the PyTorch reference, one test a fixture file."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ymplug_jax.convert import bert as tables
from ymplug_jax.convert import rules
from ymplug_jax.models import bert, layers
from ymplug_jax.models.bert import Fusion, MaskedHead, Text

OUTPUT, GRADIENT = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


def halves(config: dict) -> tuple[Text, Fusion]:
    common = {
        "heads": config["num_attention_heads"],
        "hidden": config["intermediate_size"],
        "ln_eps": config["layer_norm_eps"],
    }
    text = Text(
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        depth=config["fusion_layer"],
        max_positions=config["max_position_embeddings"],
        types=config["type_vocab_size"],
        **common,
    )
    return text, Fusion(depth=config["num_hidden_layers"] - text.depth, **common)


def test_text_encoder(read) -> None:
    file = read("text_encoder.npz")
    text, fusion = halves(file.config["bert_config"])
    weights = file.group("param")
    for copy, original in tables.TIED:
        np.testing.assert_array_equal(weights.pop(copy), weights[original])
    params = rules.to_tree(tables.BERT, weights, tables.like_of(text, fusion, head=True))
    ids, mask, both = file["in/input_ids"], file["in/attention_mask"], file["in/fusion_mask"]
    length = ids.shape[1]

    def run(params: dict) -> tuple[jax.Array, dict]:
        kept = {"capture_intermediates": True, "mutable": "intermediates"}
        states, of_text = text.apply({"params": params["text"]}, ids, mask, **kept)
        joint = jnp.concatenate([states, file["in/video_embeds"]], axis=1)
        last, of_fusion = fusion.apply({"params": params["fusion"]}, joint, both, **kept)
        logits = MaskedHead(text.ln_eps).apply(
            {"params": params["mlm"]}, last[:, :length], params["text"]["token_embed"]
        )
        out = {"text": states, "fusion": last, "logits": logits}
        out |= {"of_text": of_text["intermediates"]["blocks"], "of_fusion": of_fusion["intermediates"]["blocks"]}
        return jnp.mean(logits * file["in/grad_probe"]), out

    (loss, out), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    file.check("out/embeddings", text.apply({"params": params["text"]}, ids, method="embed"), OUTPUT)
    for name in ("text", "fusion"):
        states = jax.tree.leaves(out[f"of_{name}"]["__call__"])[0]
        for i in range(len(states)):
            file.check(f"out/{name}_layer{i}", states[i], OUTPUT)
        file.check(f"out/{name}_last", out[name], OUTPUT)
    q, k = (out["of_text"]["attn"][part]["__call__"][0][0] for part in "qk")
    one_hot = jnp.broadcast_to(jnp.eye(length)[:, None], (*k.shape[:3], length))
    bias = (1 - mask[:, None, None]) * bert.HIDDEN
    file.check("out/text_attn0", layers.attention(q, k, one_hot, bias=bias).transpose(0, 2, 1, 3), OUTPUT)
    file.check("out/extended_mask", (1 - both[:, None, None]) * bert.HIDDEN, OUTPUT)
    file.check("out/mlm_logits", out["logits"], OUTPUT)
    alone = fusion.apply({"params": params["fusion"]}, out["text"], mask)
    file.check("out/all_layers_text_only_last", alone, OUTPUT)
    file.check("loss/probe", loss, OUTPUT)
    named = rules.to_torch(tables.BERT, grads)
    file.check(
        "grad_norm/global", np.sqrt(sum(np.sum(np.square(v, dtype=np.float64)) for v in named.values())), GRADIENT
    )
    key_bias = (
        "bert.encoder.layer.0.attention.self.key.bias"  # shifts all logits of a query alike: its gradient is zero
    )
    noise = max(np.abs(named[key_bias]).max(), np.abs(file.arrays.pop(f"grad/{key_bias}")).max())
    assert noise < 1e-6 * file["grad_norm/global"]
    file.unused.discard(f"grad/{key_bias}")
    file.check_all("grad", named, GRADIENT)
    np.testing.assert_array_equal(file["buffer/bert.embeddings.position_ids"][0], np.arange(text.max_positions))
    file.done()
