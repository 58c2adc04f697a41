"""Converts BERT in the Hugging Face layout: the first half of its layers is the text encoder, the rest the fusion encoder.

The encoders are described in `docs/models/alpro.md`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from ymplug_jax.convert.plan import Layout, Plan, heads_of, layers, need
from ymplug_jax.convert.rules import SAME, Rule, heads_in, heads_out, linear, norm
from ymplug_jax.models.bert import Fusion, MaskedHead, Text


def layer(
    target: str,
    after: str = "",
    *,
    source: str = "bert.encoder.layer.{}",
    at: tuple[int, ...] = (),
    cross: bool = False,
) -> tuple[Rule, ...]:
    """The rules of a stack of layers, with or without cross-attention; `after` and `at` are those of `Rule`."""
    rules = (
        *(
            rule
            for part, name in (("q", "query"), ("k", "key"), ("v", "value"))
            for rule in heads_in(f"{source}.attention.self.{name}", f"{target}/attn/{part}")
        ),
        *heads_out(f"{source}.attention.output.dense", f"{target}/attn/o"),
        *norm(f"{source}.attention.output.LayerNorm", f"{target}/attn_norm"),
        *linear(f"{source}.intermediate.dense", f"{target}/mlp/up"),
        *linear(f"{source}.output.dense", f"{target}/mlp/down"),
        *norm(f"{source}.output.LayerNorm", f"{target}/mlp_norm"),
    )
    if cross:
        rules += tuple(
            rule._replace(
                source=rule.source.replace(".attention.", ".crossattention."),
                targets=tuple(path and path.replace("/attn", "/cross") for path in rule.targets),
            )
            for rule in rules
            if ".attention." in rule.source
        )
    return tuple(rule._replace(after=after, at=at) for rule in rules)


BERT = (
    Rule("bert.embeddings.word_embeddings.weight", "v d -> v d", ("text/token_embed",)),
    Rule("bert.embeddings.position_embeddings.weight", "p d -> p d", ("text/pos_embed",)),
    Rule("bert.embeddings.token_type_embeddings.weight", "p d -> p d", ("text/type_embed",)),
    *norm("bert.embeddings.LayerNorm", "text/embed_norm"),
    *layer("text/blocks"),
    *layer("fusion/blocks", after="text/blocks"),
    *linear("cls.predictions.transform.dense", "mlm/hidden"),
    *norm("cls.predictions.transform.LayerNorm", "mlm/norm"),
    Rule("cls.predictions.bias", SAME, ("mlm/bias",)),
)
DROP = (r"bert\.pooler\..*", r"cls\.seq_relationship\..*", r"bert\.embeddings\.position_ids")
TIED = (
    ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
)
LAYOUTS = {"hugging_face": Layout(BERT, drop=DROP, tied=TIED)}
# Files converted from TensorFlow name the weights of a norm gamma and beta; files of BertModel have no "bert." prefix.
RENAME = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
    (r"^(?=(embeddings|encoder|pooler)\.)", "bert."),
)
HEADS = {768: 12, 1024: 16}  # by width


def bert_of(
    shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int], first: int | None = None
) -> tuple[Text, Fusion]:
    """The text encoder of the first `first` layers (None: half) and the fusion encoder of the rest.

    Raises:
      UnknownModel: the tensors are not a BERT's.
    """
    vocab, width = need(shapes, "bert.embeddings.word_embeddings.weight")
    depth = layers(shapes, r"bert\.encoder\.layer\.(\d+)\.")
    first = depth // 2 if first is None else first
    count, hidden = (
        heads_of("text", width, HEADS, heads),
        need(shapes, "bert.encoder.layer.0.intermediate.dense.weight")[0],
    )
    text = Text(
        vocab=vocab,
        width=width,
        depth=first,
        heads=count,
        hidden=hidden,
        max_positions=need(shapes, "bert.embeddings.position_embeddings.weight")[0],
        types=need(shapes, "bert.embeddings.token_type_embeddings.weight")[0],
    )
    return text, Fusion(depth=depth - first, heads=count, hidden=hidden)


def like_of(text: Text, fusion: Fusion, head: bool) -> dict:
    """Parameter tree (ShapeDtypeStructs) of both encoders and, with `head`, of the masked-language-model head."""
    x, one = jnp.zeros((1, 1, text.width)), jnp.ones((1, 1), jnp.int32)

    def init() -> dict:
        key = jax.random.key(0)
        params = {"text": text.init(key, one, one)["params"], "fusion": fusion.init(key, x, one)["params"]}
        if head:
            params["mlm"] = MaskedHead().init(key, x, params["text"]["token_embed"])["params"]
        return params

    return jax.eval_shape(init)


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """Recognise a BERT; its parameters go under "text", "fusion" and, if it has a masked-language-model head, "mlm"."""
    halves = bert_of(shapes, heads)
    return Plan("hugging_face", like_of(*halves, head="cls.predictions.bias" in shapes), halves)
