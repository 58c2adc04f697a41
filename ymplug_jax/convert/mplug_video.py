"""Names and layouts of the released GPT-3 mPLUG-video checkpoints and of their parts. The tables serve both directions."""

from ymplug_jax.convert.rules import Rule, under

LINEAR = "out in -> in out"
SAME = "d -> d"


def _linear(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", LINEAR, (f"{target}/kernel",)), Rule(f"{source}.bias", SAME, (f"{target}/bias",))


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", SAME, (f"{target}/scale",)), Rule(f"{source}.bias", SAME, (f"{target}/bias",))


def _heads_out(source: str, target: str) -> tuple[Rule, ...]:
    return Rule(f"{source}.weight", "d (n h) -> n h d", (f"{target}/kernel",)), Rule(
        f"{source}.bias", SAME, (f"{target}/bias",)
    )


def _timesformer_attn(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.qkv.weight", "(part n h) d -> d n h", tuple(f"{target}/{p}/kernel" for p in "qkv")),
        Rule(f"{source}.q_bias", "(n h) -> n h", (f"{target}/q/bias",)),
        Rule(f"{source}.v_bias", "(n h) -> n h", (f"{target}/v/bias",)),
        *_heads_out(f"{source}.proj", f"{target}/o"),
    )


# The TimeSformer of Youku-mPLUG: mPLUG-video, ALPRO and the baseline.
TIMESFORMER = (
    Rule("cls_token", "1 1 d -> d", ("cls",)),
    Rule("pos_embed", "1 p d -> p d", ("pos_embed",)),
    Rule("temporal_embed", "1 t d -> t d", ("temporal_embed",)),
    Rule("patch_embed.proj.weight", "d rgb y x -> y x rgb d", ("patch/kernel",)),
    Rule("patch_embed.proj.bias", SAME, ("patch/bias",)),
    *_norm("norm_pre", "norm_pre"),
    *_norm("blocks.{}.temporal_ln", "blocks/temporal_norm"),
    *_timesformer_attn("blocks.{}.temporal_attn", "blocks/temporal_attn"),
    *_linear("blocks.{}.temporal_fc", "blocks/temporal_fc"),
    *_norm("blocks.{}.norm1", "blocks/attn_norm"),
    *_timesformer_attn("blocks.{}.attn", "blocks/attn"),
    *_norm("blocks.{}.norm2", "blocks/mlp_norm"),
    *_linear("blocks.{}.mlp.fc1", "blocks/mlp/up"),
    *_linear("blocks.{}.mlp.fc2", "blocks/mlp/down"),
    *_norm("norm", "norm"),
)

# The abstractor without its queries, which the checkpoints keep at the top.
ABSTRACTOR = (
    *_norm("norm1", "query_norm"),
    *_norm("normk", "context_norm"),
    *_norm("norm2", "mlp_norm"),
    Rule("attn.in_proj_weight", "(part n h) d -> d n h", tuple(f"attn/{p}/kernel" for p in "qkv")),
    Rule("attn.in_proj_bias", "(part n h) -> n h", tuple(f"attn/{p}/bias" for p in "qkv")),
    Rule("attn.bias_k", "1 1 (n h) -> n h", ("extra_key",)),
    Rule("attn.bias_v", "1 1 (n h) -> n h", ("extra_value",)),
    *_heads_out("attn.out_proj", "attn/o"),
    *_linear("mlp.fc1", "mlp/up"),
    *_linear("mlp.fc2", "mlp/down"),
)
QUERIES = "1 q d -> q d"

# GPT-3 in Megatron's layout: q, k and v interleaved per head; no tensor for the tied output layer.
_LAYER = "language_model.encoder.layers.{}"
GPT3 = (
    Rule("language_model.embedding.word_embeddings.weight", "v d -> v d", ("token_embed",)),
    Rule("language_model.embedding.position_embeddings.weight", "p d -> p d", ("pos_embed",)),
    *_norm(f"{_LAYER}.input_layernorm", "blocks/attn_norm"),
    *_norm(f"{_LAYER}.post_attention_layernorm", "blocks/mlp_norm"),
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
    *_heads_out(f"{_LAYER}.self_attention.dense", "blocks/attn/o"),
    *_linear(f"{_LAYER}.mlp.dense_h_to_4h", "blocks/mlp/up"),
    *_linear(f"{_LAYER}.mlp.dense_4h_to_h", "blocks/mlp/down"),
    *_norm("language_model.encoder.final_layernorm", "norm"),
)

MPLUG_VIDEO = (
    Rule("learnable_queries", QUERIES, ("abstractor/queries",)),
    *under("visual_encoder.", "vision/", TIMESFORMER),
    *under("attn_pool.", "abstractor/", ABSTRACTOR),
    *_linear("visual_fc", "connector/proj"),
    *_norm("visual_norm", "connector/norm"),
    *under("text_decoder.dist_model.", "llm/", GPT3),
    *_linear("vision_proj", "vision_proj"),
    *_linear("text_proj", "text_proj"),
    Rule("temp", "->", ("temperature",)),
    *_linear("cls_head.0", "head/hidden"),
    *_linear("cls_head.2", "head/out"),
)
