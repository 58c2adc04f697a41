"""The GPT-3 of ModelScope (`nlp_gpt3_text-generation_*`, Megatron layout) as the language model of mPLUG-video."""

import re
from collections.abc import Mapping
from functools import partial

import jax

from ymplug_jax.convert import rules
from ymplug_jax.convert.plan import Layout, Plan, UnknownModel, heads_of, layers, need
from ymplug_jax.convert.rules import Rule, heads_out, linear, norm
from ymplug_jax.models import language_model
from ymplug_jax.models.gpt3 import GPT3 as Decoder

# Megatron's layout: q, k and v interleaved per head; no tensor for the tied output layer.
_LAYER = "language_model.encoder.layers.{}"
GPT3 = (
    Rule("language_model.embedding.word_embeddings.weight", "v d -> v d", ("token_embed",)),
    Rule("language_model.embedding.position_embeddings.weight", "p d -> p d", ("pos_embed",)),
    *norm(f"{_LAYER}.input_layernorm", "blocks/attn_norm"),
    *norm(f"{_LAYER}.post_attention_layernorm", "blocks/mlp_norm"),
    Rule(
        f"{_LAYER}.self_attention.query_key_value.weight",
        "(n part h) d -> d n h",
        tuple(f"blocks/attn/{p}/kernel" for p in "qkv"),
    ),
    Rule(
        f"{_LAYER}.self_attention.query_key_value.bias",
        "(n part h) -> n h",
        tuple(f"blocks/attn/{p}/bias" for p in "qkv"),
    ),
    *heads_out(f"{_LAYER}.self_attention.dense", "blocks/attn/o"),
    *linear(f"{_LAYER}.mlp.dense_h_to_4h", "blocks/mlp/up"),
    *linear(f"{_LAYER}.mlp.dense_4h_to_h", "blocks/mlp/down"),
    *norm("language_model.encoder.final_layernorm", "norm"),
)

# Files of a tensor-parallel save hold pieces of these along an axis; all other tensors are the same in each.
MERGE = {
    rf".*{name}": axis
    for name, axis in (
        (r"embedding\.word_embeddings\.weight", 0),
        (r"self_attention\.query_key_value\.(weight|bias)", 0),
        (r"mlp\.dense_h_to_4h\.(weight|bias)", 0),
        (r"self_attention\.dense\.weight", 1),
        (r"mlp\.dense_4h_to_h\.weight", 1),
    )
}
LLM_HEADS = {2048: 32, 2560: 32, 5120: 40}  # by width
LAYOUTS = {"megatron": Layout(rules.under("", "llm/", GPT3))}
FROZEN = ("llm/.*",)


def llm_of(shapes: Mapping[str, tuple[int, ...]], prefix: str, heads: Mapping[str, int]) -> Decoder:
    """The GPT-3 whose tensors' names begin with `prefix`.

    Raises:
      UnknownModel: there is none, or this is a tensor-parallel piece of one.
    """
    vocab, width = need(shapes, f"{prefix}.embedding.word_embeddings.weight")
    if shapes.get(f"{prefix}.encoder.layers.0.mlp.dense_h_to_4h.weight", (4 * width, width))[0] != 4 * width:
        raise UnknownModel(
            "this is one of several tensor-parallel pieces; give all mp_rank_*_model_states.pt of the model, or their folder"
        )
    return Decoder(
        vocab=vocab,
        width=width,
        depth=layers(shapes, re.escape(prefix) + r"\.encoder\.layers\.(\d+)\."),
        heads=heads_of("llm", width, LLM_HEADS, heads),
        max_positions=need(shapes, f"{prefix}.embedding.position_embeddings.weight")[0],
    )


def llm_like(model: Decoder) -> dict:
    """Abstract parameters of a GPT-3."""
    return jax.eval_shape(partial(language_model.init, model), jax.random.key(0))


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """What the tensors are: a GPT-3 under "llm"."""
    model = llm_of(shapes, "language_model", heads)
    return Plan("megatron", {"llm": llm_like(model)}, model)
