"""Converts ModelScope's GPT-3 (`nlp_gpt3_text-generation_*`, Megatron layout), the language model of mPLUG-video.

The model is described in `docs/models/language_models.md`, GPT-3.
"""

import re
from collections.abc import Mapping
from functools import partial

import jax

from ymplug_jax.convert import lora, rules
from ymplug_jax.convert.plan import Layout, Plan, UnknownModel, heads_of, layers, need
from ymplug_jax.convert.rules import Rule, heads_out, linear, low_rank, norm
from ymplug_jax.models import language_model
from ymplug_jax.models.gpt3 import GPT3 as Decoder

# Megatron interleaves q, k and v per head and stores no tensor for the tied output layer.
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
    Rule(f"{_LAYER}.self_attention.query_key_value.lora_A.weight", "r d -> d r", ("blocks/lora/qkv/a",)),
    Rule(
        f"{_LAYER}.self_attention.query_key_value.lora_B.weight",
        "(n part h) r -> r n h",
        tuple(f"blocks/lora/qkv/{p}" for p in "qkv"),
    ),
    *heads_out(f"{_LAYER}.self_attention.dense", "blocks/attn/o"),
    *linear(f"{_LAYER}.mlp.dense_h_to_4h", "blocks/mlp/up"),
    *linear(f"{_LAYER}.mlp.dense_4h_to_h", "blocks/mlp/down"),
    *low_rank(f"{_LAYER}.self_attention.dense", "blocks/lora/o", "n h", "d"),
    *low_rank(f"{_LAYER}.mlp.dense_h_to_4h", "blocks/lora/up", "d", "m"),
    *low_rank(f"{_LAYER}.mlp.dense_4h_to_h", "blocks/lora/down", "m", "d"),
    *norm("language_model.encoder.final_layernorm", "norm"),
)

# Axes along which tensor parallelism splits these tensors. All other tensors are the same in every piece.
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
FROZEN = (r"llm/(?!blocks/lora/).*",)
RENAME = lora.RENAME
ADAPTED = lora.FUSED_LAYERS


def llm_of(shapes: Mapping[str, tuple[int, ...]], prefix: str, heads: Mapping[str, int]) -> Decoder:
    """The GPT-3 module for the tensors whose names begin with `prefix`.

    Raises:
      UnknownModel: there are none, or they are one tensor-parallel piece of a GPT-3.
    """
    vocab, width = need(shapes, f"{prefix}.embedding.word_embeddings.weight")
    if shapes.get(f"{prefix}.encoder.layers.0.mlp.dense_h_to_4h.weight", (4 * width, width))[0] != 4 * width:
        raise UnknownModel(
            "holds one of several tensor-parallel pieces; give all mp_rank_*_model_states.pt of the model, or their folder"
        )
    return Decoder(
        vocab=vocab,
        width=width,
        depth=layers(shapes, re.escape(prefix) + r"\.encoder\.layers\.(\d+)\."),
        heads=heads_of("llm", width, LLM_HEADS, heads),
        max_positions=need(shapes, f"{prefix}.embedding.position_embeddings.weight")[0],
        **lora.settings_of(shapes, re.escape(prefix) + r"\.encoder\.layers\.\d+\.", ADAPTED),
    )


def llm_like(model: Decoder) -> dict:
    """Parameter tree of ShapeDtypeStructs."""
    return jax.eval_shape(partial(language_model.init, model), jax.random.key(0))


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """Recognise a GPT-3; its parameters go under "llm"."""
    model = llm_of(shapes, "language_model", heads)
    return Plan("megatron", {"llm": llm_like(model)}, model)
