"""Converts BLOOM and BLOOMZ in the Hugging Face layout, of any size, with or without LoRA adapters in the PEFT layout.

The model is described in `docs/models/language_models.md`, BLOOM and LoRA.
"""

from collections.abc import Mapping
from typing import Any

import jax

from ymplug_jax.convert import lora
from ymplug_jax.convert.hub_config import HubConfig
from ymplug_jax.convert.plan import Layout, Plan, UnknownModel, heads_of, layers, need
from ymplug_jax.convert.rules import Rule, heads_out, linear, low_rank, norm, under
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
    Rule(f"{_FUSED}.lora_A.weight", "r d -> d r", ("blocks/lora/qkv/a",)),
    Rule(f"{_FUSED}.lora_B.weight", "(n part h) r -> r n h", tuple(f"blocks/lora/qkv/{p}" for p in "qkv")),
    *heads_out(f"{_LAYER}.self_attention.dense", "blocks/attn/o"),
    *linear(f"{_LAYER}.mlp.dense_h_to_4h", "blocks/mlp/up"),
    *linear(f"{_LAYER}.mlp.dense_4h_to_h", "blocks/mlp/down"),
    *low_rank(f"{_LAYER}.self_attention.dense", "blocks/lora/o", "n h", "d"),
    *low_rank(f"{_LAYER}.mlp.dense_h_to_4h", "blocks/lora/up", "d", "m"),
    *low_rank(f"{_LAYER}.mlp.dense_4h_to_h", "blocks/lora/down", "m", "d"),
    *norm("transformer.ln_f", "norm"),
)
TIED = (("lm_head.weight", "transformer.word_embeddings.weight"),)
LAYOUTS = {"hugging_face": Layout(under("", "llm/", BLOOM), tied=TIED)}
# The first released files have no "transformer." prefix, and PEFT adds its own prefixes.
RENAME = (
    *lora.RENAME,
    (r"^language_model\.", ""),
    (r"^(?=word_embeddings|h\.\d|ln_f)", "transformer."),
)
FROZEN = (r"llm/(?!blocks/lora/).*",)
MODEL_TYPES = ("bloom",)  # of config.json
ADAPTED = lora.FUSED_LAYERS
HEADS = {1024: 16, 1536: 16, 2048: 16, 2560: 32, 4096: 32, 14336: 112}  # by width: 560m 1b1 1b7 3b 7b1 176b


def bloom_of(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int], config: HubConfig | None = None) -> Bloom:
    """The Bloom module for these tensors and, if present, their config.json.

    Raises:
      UnknownModel: the tensors are not a BLOOM's, or they do not match config.json.
    """
    vocab, width = need(shapes, "transformer.word_embeddings.weight")
    depth, known, eps = layers(shapes, r"transformer\.h\.(\d+)\."), HEADS, 1e-5
    if config:
        count = config.size("n_head", "num_attention_heads")
        if heads.get("llm", count) != count:
            raise UnknownModel(f"--heads llm={heads['llm']}: {config.file} says {count}; leave it out")
        config.agree({"vocab_size": vocab, "hidden_size": width, "n_embed": width, "n_layer": depth})
        if config.values.get("apply_residual_connection_post_layernorm"):
            raise UnknownModel(
                f"{config.file}: apply_residual_connection_post_layernorm is true; give a BLOOM without it"
            )
        known, eps = {width: count}, config.number("layer_norm_epsilon", 1e-5)
    return Bloom(
        vocab=vocab,
        width=width,
        depth=depth,
        heads=heads_of("llm", width, known, heads),
        ln_eps=eps,
        **lora.settings_of(shapes, r"transformer\.h\.\d+\.", ADAPTED),
    )


def like_of(model: Bloom) -> dict:
    """Parameter tree of ShapeDtypeStructs."""
    return jax.eval_shape(lambda: language_model.init(model, jax.random.key(0)))


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int], config: HubConfig | None = None) -> Plan:
    """Recognise a BLOOM; its parameters go under "llm"."""
    model = bloom_of(shapes, heads, config)
    return Plan("hugging_face", {"llm": like_of(model)}, model)


def config_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Content of config.json for Hugging Face's classes, from the fields of `Bloom`. PEFT describes adapters in its own file."""
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": settings["vocab"],
        "hidden_size": settings["width"],
        "n_layer": settings["depth"],
        "n_head": settings["heads"],
        "layer_norm_epsilon": settings["ln_eps"],
        "tie_word_embeddings": True,
    }
