"""Converts Qwen2, Qwen2.5 and Qwen3 (dense) in the Hugging Face layout, of any size.

The model is described in `docs/models/language_models.md`, Qwen.
"""

from collections.abc import Mapping
from typing import Any

import jax

from ymplug_jax.convert import lora
from ymplug_jax.convert.hub_config import HubConfig
from ymplug_jax.convert.plan import Layout, Plan, UnknownModel, layers, need
from ymplug_jax.convert.rules import LINEAR, SAME, Rule, heads_in, low_rank, under
from ymplug_jax.core.exits import Mistake
from ymplug_jax.models.language_model import init
from ymplug_jax.models.qwen import Qwen

_LAYER = "model.layers.{}"
QWEN = (
    Rule("model.embed_tokens.weight", "v d -> v d", ("token_embed",)),
    Rule(f"{_LAYER}.input_layernorm.weight", SAME, ("blocks/attn_norm/scale",)),
    Rule(f"{_LAYER}.post_attention_layernorm.weight", SAME, ("blocks/mlp_norm/scale",)),
    *(rule for p in "qkv" for rule in heads_in(f"{_LAYER}.self_attn.{p}_proj", f"blocks/attn/{p}")),
    *(Rule(f"{_LAYER}.self_attn.{p}_norm.weight", SAME, (f"blocks/attn/{p}_norm/scale",)) for p in "qk"),
    Rule(f"{_LAYER}.self_attn.o_proj.weight", "d (n h) -> n h d", ("blocks/attn/o/kernel",)),
    *(Rule(f"{_LAYER}.mlp.{p}_proj.weight", LINEAR, (f"blocks/mlp/{p}/kernel",)) for p in ("gate", "up", "down")),
    *(rule for p in "qkv" for rule in low_rank(f"{_LAYER}.self_attn.{p}_proj", f"blocks/lora/{p}", "d", "n h")),
    *low_rank(f"{_LAYER}.self_attn.o_proj", "blocks/lora/o", "n h", "d"),
    *low_rank(f"{_LAYER}.mlp.gate_proj", "blocks/lora/gate", "d", "m"),
    *low_rank(f"{_LAYER}.mlp.up_proj", "blocks/lora/up", "d", "m"),
    *low_rank(f"{_LAYER}.mlp.down_proj", "blocks/lora/down", "m", "d"),
    Rule("model.norm.weight", SAME, ("norm/scale",)),
    Rule("lm_head.weight", LINEAR, ("head/kernel",)),
)
TIED = (("lm_head.weight", "model.embed_tokens.weight"),)
# Old files also hold the rotary frequencies.
LAYOUTS = {"hugging_face": Layout(under("", "llm/", QWEN), drop=(r".*rotary_emb\.inv_freq",), tied=TIED)}
RENAME = (
    *lora.RENAME,
    (r"^(?=embed_tokens\.|layers\.\d|norm\.)", "model."),
)  # files without the language-model head
FROZEN = (r"llm/(?!blocks/lora/).*",)
ADAPTED = {  # linear layer of a block -> path in `Qwen.lora_targets`
    **{f"self_attn.{part}_proj": f"attn/{part}" for part in "qkvo"},
    **{f"mlp.{part}_proj": f"mlp/{part}" for part in ("gate", "up", "down")},
}
MODEL_TYPES = ("qwen2", "qwen3")  # of config.json


def qwen_of(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int], config: HubConfig | None) -> Qwen:
    """The Qwen module for these tensors and their config.json.

    Raises:
      UnknownModel: the tensors are not a Qwen's, they do not match config.json, or the model is a variant that `Qwen` does not
        implement.
    """
    vocab, width = need(shapes, "model.embed_tokens.weight")
    if config is None:
        raise UnknownModel(
            "no config.json beside the weights, which tells the number of heads, the rotary base and epsilon; download it with the "
            "weights"
        )
    attn = "model.layers.0.self_attn"
    qk_norm = f"{attn}.q_norm.weight" in shapes
    _refuse(config, qk_norm)
    count, rows = config.size("num_attention_heads"), need(shapes, f"{attn}.q_proj.weight")[0]
    if heads.get("llm", count) != count:
        raise UnknownModel(f"--heads llm={heads['llm']}: {config.file} says {count}; leave it out")
    if rows % count:
        raise UnknownModel(
            f"{config.file}: num_attention_heads is {count}, but q_proj has {rows} rows; download both again"
        )
    limit = "max_position_embeddings"
    head_dim, mlp = rows // count, need(shapes, "model.layers.0.mlp.gate_proj.weight")[0]
    model = Qwen(
        vocab=vocab,
        width=width,
        depth=layers(shapes, r"model\.layers\.(\d+)\."),
        heads=count,
        kv_heads=need(shapes, f"{attn}.k_proj.weight")[0] // head_dim,
        head_dim=head_dim,
        mlp=mlp,
        rope_theta=_rope_theta(config),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        qkv_bias=f"{attn}.q_proj.bias" in shapes,
        qk_norm=qk_norm,
        tied=bool(config.values.get("tie_word_embeddings", "lm_head.weight" not in shapes)),
        max_positions=config.size(limit) if config.values.get(limit) is not None else None,
        **lora.settings_of(shapes, r"model\.layers\.\d+\.", ADAPTED),
    )
    config.agree(
        {
            "vocab_size": vocab,
            "hidden_size": width,
            "num_hidden_layers": model.depth,
            "num_key_value_heads": model.kv_heads,
            "head_dim": head_dim,
            "intermediate_size": mlp,
        }
    )
    return model


def _refuse(config: HubConfig, qk_norm: bool) -> None:
    """Refuse settings that change the computation and that `Qwen` does not implement."""
    values = config.values
    sliding = values.get("use_sliding_window") or "sliding_attention" in (values.get("layer_types") or ())
    ropes = [values.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    kinds = [rope.get("rope_type", rope.get("type", "default")) for rope in ropes]
    odd = {
        "use_sliding_window": sliding,
        **{f"rope_scaling of type {kind}": kind != "default" for kind in kinds},
        f"hidden_act {values.get('hidden_act')}": values.get("hidden_act", "silu") != "silu",
    }
    if found := [name for name, there in odd.items() if there]:
        raise UnknownModel(
            f"{config.file}: {', '.join(found)} is not supported; give a dense Qwen2, Qwen2.5 or Qwen3 without it"
        )
    if qk_norm != (values["model_type"] == "qwen3"):
        has = "norms" if qk_norm else "no norms"
        raise UnknownModel(
            f"{config.file}: model_type is {values['model_type']!r}, but the weights have {has} of q and k; download both from the same place"
        )


def _rope_theta(config: HubConfig) -> float:
    rope = config.values.get("rope_parameters") or {}
    return config._replace(values={**config.values, **rope}).number("rope_theta", 10000.0)


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int], config: HubConfig | None = None) -> Plan:
    """Recognise a Qwen; its parameters go under "llm"."""
    model = qwen_of(shapes, heads, config)
    like = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    return Plan("hugging_face", {"llm": like}, model)


def config_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Content of config.json for Hugging Face's classes, from the fields of `Qwen`.

    Raises:
      Mistake: Hugging Face has no class for this model.
    """
    three, limit = settings["qk_norm"], settings.get("max_positions")
    if settings["qkv_bias"] == three:
        raise Mistake(
            "config.model.llm: no class of Hugging Face has both qkv_bias (Qwen2) and qk_norm (Qwen3), or neither; only models with "
            "one of the two can be written"
        )
    return {
        "architectures": ["Qwen3ForCausalLM" if three else "Qwen2ForCausalLM"],
        "model_type": "qwen3" if three else "qwen2",
        "vocab_size": settings["vocab"],
        "hidden_size": settings["width"],
        "num_hidden_layers": settings["depth"],
        "num_attention_heads": settings["heads"],
        "num_key_value_heads": settings["kv_heads"],
        "head_dim": settings["head_dim"],
        "intermediate_size": settings["mlp"],
        "hidden_act": "silu",
        "rope_theta": settings["rope_theta"],
        "rms_norm_eps": settings["norm_eps"],
        "attention_bias": settings["qkv_bias"],
        "tie_word_embeddings": settings["tied"],
        **({} if limit is None else {"max_position_embeddings": limit}),
    }
