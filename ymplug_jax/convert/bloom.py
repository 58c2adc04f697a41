"""BLOOM and BLOOMZ in the Hugging Face layout, any size, with or without adapters in the PEFT layout, as a language model."""

import re
from collections.abc import Mapping

import jax

from ymplug_jax.convert.plan import Layout, Plan, UnknownModel, heads_of, layers, need
from ymplug_jax.convert.rules import Rule, heads_out, linear, norm, under
from ymplug_jax.models import language_model
from ymplug_jax.models.bloom import Bloom

_LAYER = "transformer.h.{}"
_FUSED = f"{_LAYER}.self_attention.query_key_value"
BLOOM = (
    Rule("transformer.word_embeddings.weight", "v d -> v d", ("token_embed",)),
    *norm("transformer.word_embeddings_layernorm", "embed_norm"),
    *norm(f"{_LAYER}.input_layernorm", "blocks/attn_norm"),
    *norm(f"{_LAYER}.post_attention_layernorm", "blocks/mlp_norm"),
    Rule(f"{_FUSED}.weight", "(n part h) d -> d n h", tuple(f"blocks/attn/{p}/kernel" for p in "qkv")),
    Rule(f"{_FUSED}.bias", "(n part h) -> n h", tuple(f"blocks/attn/{p}/bias" for p in "qkv")),
    Rule(f"{_FUSED}.lora_A.weight", "r d -> d r", ("blocks/lora/a",)),
    Rule(f"{_FUSED}.lora_B.weight", "(n part h) r -> r n h", tuple(f"blocks/lora/{p}" for p in "qkv")),
    *heads_out(f"{_LAYER}.self_attention.dense", "blocks/attn/o"),
    *linear(f"{_LAYER}.mlp.dense_h_to_4h", "blocks/mlp/up"),
    *linear(f"{_LAYER}.mlp.dense_4h_to_h", "blocks/mlp/down"),
    *norm("transformer.ln_f", "norm"),
)
TIED = (("lm_head.weight", "transformer.word_embeddings.weight"),)
LAYOUTS = {"hugging_face": Layout(under("", "llm/", BLOOM), tied=TIED)}
# The first files were written from the bare model; adapters stand under the wrapper's names.
RENAME = (
    (r"^base_model\.model\.", ""),
    (r"^language_model\.", ""),
    (r"^(?=word_embeddings|h\.\d|ln_f)", "transformer."),
    (r"\.lora_([AB])\.default\.", r".lora_\1."),
)
FROZEN = (r"llm/(?!blocks/lora/).*",)
HEADS = {1024: 16, 1536: 16, 2048: 16, 2560: 32, 4096: 32, 14336: 112}  # by width: 560m 1b1 1b7 3b 7b1 176b


def bloom_of(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Bloom:
    """The BLOOM of these tensors.

    Raises:
      UnknownModel: they are none.
    """
    vocab, width = need(shapes, "transformer.word_embeddings.weight")
    adapter = shapes.get("transformer.h.0.self_attention.query_key_value.lora_A.weight", (0,))
    other = [name for name in shapes if "lora_" in name and not re.search(r"query_key_value\.lora_[AB]\.weight$", name)]
    if other:
        raise UnknownModel(f"the adapter changes {other[0]}; only query_key_value is known, so merge it: --lora DIR")
    return Bloom(
        vocab=vocab,
        width=width,
        depth=layers(shapes, r"transformer\.h\.(\d+)\."),
        heads=heads_of("llm", width, HEADS, heads),
        lora_rank=adapter[0],
    )


def like_of(model: Bloom) -> dict:
    """Abstract parameters."""
    return jax.eval_shape(lambda: language_model.init(model, jax.random.key(0)))


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """What the tensors are: a BLOOM under "llm"."""
    model = bloom_of(shapes, heads)
    return Plan("hugging_face", {"llm": like_of(model)}, model)
