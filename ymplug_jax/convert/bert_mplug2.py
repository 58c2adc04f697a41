"""Converts BERT in the Hugging Face layout to the start of an mPLUG-2: text encoder, fusion encoder, decoder and masked-word head.

The parts overlap, so tensors of the file are read several times. Cross-attention and latents start fresh. The parts are described in
`docs/models/mplug2.md`, "Initialisation".
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ymplug_jax.convert import bert
from ymplug_jax.convert.mplug2 import EMBEDDINGS, PREDICTIONS, TEXT_HEADS
from ymplug_jax.convert.plan import Layout, Plan, UnknownModel, heads_of, layers, need
from ymplug_jax.convert.rules import Rule, under
from ymplug_jax.models.bert import MaskedHead, Text
from ymplug_jax.models.bert_decoder import Decoder
from ymplug_jax.models.language_model import Memory
from ymplug_jax.models.universal import Fusion, Universal

RENAME = bert.RENAME
# Prefixes under which tensors of the file, given by a regex, are read once more.
COPIES = (
    ("fusion:", r"bert\.encoder\..*"),
    ("decoder:", r"bert\.(embeddings|encoder)\..*|cls\.predictions\.(bias|transform\..*)"),
    ("mlm:", r"bert\.embeddings\.word_embeddings\.weight"),
)
DECODER = 12  # layers of the decoder, the first of the file
FRESH = ("cross", "cross_norm")  # parts of a layer that BERT does not have
_LAYER = "bert.encoder.layer.{}"
_DROP = (*bert.DROP, r"(fusion|decoder):.*")


def layout(depth: int, universal: int, fusion: int) -> Layout:
    """The names of a BERT of `depth` layers, for `universal` universal and `fusion` fusion layers.

    Without universal layers the text encoder has the layers that the fusion encoder leaves; with them it has all, they are the
    last, and the fusion encoder starts from the last ones too.
    """
    text = depth if universal else depth - fusion
    rules = (
        *under("bert.", "text/", EMBEDDINGS),
        *bert.layer("text/blocks", source=_LAYER, at=tuple(range(text - universal))),
        *bert.layer("universal/blocks", source=_LAYER, at=tuple(range(text - universal, text))),
        *bert.layer("fusion/blocks", source=f"fusion:{_LAYER}", at=tuple(range(depth - fusion, depth))),
        *under("decoder:bert.", "decoder/", EMBEDDINGS),
        *bert.layer("decoder/blocks", source=f"decoder:{_LAYER}"),
        *under("decoder:", "decoder/head/", PREDICTIONS),
        Rule("mlm:bert.embeddings.word_embeddings.weight", "v d -> v d", ("mlm/token_embed",)),
        *under("", "mlm/", PREDICTIONS),
    )
    return Layout(rules, drop=(*_DROP, _LAYER.format(r"\d+").replace(".", r"\.") + r"\..*"), tied=bert.TIED)


class Layouts(dict[str, Layout]):
    """The layouts, made when their name "DEPTH:UNIVERSAL:FUSION" is looked up."""

    def __missing__(self, name: str) -> Layout:
        """See `layout`."""
        depth, universal, fusion = map(int, name.split(":"))
        return layout(depth, universal, fusion)


LAYOUTS = Layouts({"12:0:6": layout(12, 0, 6)})
__all__ = ["COPIES", "LAYOUTS", "RENAME", "plan"]


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """Recognise a BERT. `heads` may hold "universal" and "fusion", the numbers of these layers.

    Twelve layers start variant "mplug_youku" (6 fusion layers), or "mplug2" if `universal` is given (3 fusion layers); 24 layers
    start the large "mplug2" (2 universal, 6 fusion layers).

    Raises:
      UnknownModel: the tensors are not a BERT's, or the numbers of layers do not fit.
    """
    vocab, width = need(shapes, "bert.embeddings.word_embeddings.weight")
    depth = layers(shapes, r"bert\.encoder\.layer\.(\d+)\.")
    universal = heads.get("universal", 2 if depth == 24 else 0)
    fusion = heads.get("fusion", {12: 3 if universal else 6, 24: 6}.get(depth, 0))
    if not fusion:
        raise UnknownModel(
            f"a BERT of {depth} layers is no released size; give --heads fusion=N and, if it has them, universal=N"
        )
    below = depth - (universal or fusion)
    if below < 1 or fusion > depth:
        raise UnknownModel(
            f"has {depth} layers, too few for {universal} universal and {fusion} fusion layers; give fewer with --heads"
        )
    sizes: dict[str, Any] = {
        "width": width,
        "heads": heads_of("text", width, TEXT_HEADS, heads),
        "hidden": need(shapes, "bert.encoder.layer.0.intermediate.dense.weight")[0],
    }
    tables: dict[str, Any] = {
        "vocab": vocab,
        "max_positions": need(shapes, "bert.embeddings.position_embeddings.weight")[0],
        "types": need(shapes, "bert.embeddings.token_type_embeddings.weight")[0],
    }
    text = Text(depth=below, **tables, **sizes)
    shared, above = Universal(depth=universal or 1, **sizes), Fusion(depth=fusion, **sizes)
    decoder = Decoder(depth=min(DECODER, depth), **tables, **sizes)
    need(shapes, "cls.predictions.bias")

    def init() -> dict:
        key, x, one = jax.random.key(0), jnp.zeros((1, 1, width)), jnp.ones((1, 1), jnp.int32)
        made = {
            "text": text.init(key, one, one)["params"],
            "fusion": above.init(key, x, one, x)["params"],
            "decoder": decoder.init(key, x, memory=Memory(x))["params"],
        }
        made["decoder"]["head"] = MaskedHead().init(key, x, made["text"]["token_embed"])["params"]
        made["mlm"] = {"token_embed": made["text"]["token_embed"], **made["decoder"]["head"]}
        if universal:
            made["universal"] = {"blocks": shared.init(key, x, method="read_video")["params"]["blocks"]}
        for part in ("universal", "fusion", "decoder"):
            if part in made:
                made[part]["blocks"] = {k: v for k, v in made[part]["blocks"].items() if k not in FRESH}
        return made

    models = (text, *([shared] if universal else []), above, decoder)
    return Plan(f"{depth}:{universal}:{fusion}", jax.eval_shape(init), models)
