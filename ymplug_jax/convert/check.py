"""`--check`: runs the source in PyTorch and the conversion in JAX on the same random inputs and compares each module in float32."""

import gc
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from ymplug_jax.convert import mplug2 as mplug2_tables
from ymplug_jax.convert.leaves import verified
from ymplug_jax.convert.source_files import SourceError
from ymplug_jax.convert.to_orbax import Opened, Wish, open_source
from ymplug_jax.core import state, stored_params
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.models.bert import Fusion, MaskedHead, Text
from ymplug_jax.models.clip_vit import VIDEO_EPS, ClipViT, VideoClipViT
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.models.mplug_chat import MPLUGChat
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.models.timesformer import TimeSformer

TOLERANCE = 1e-3  # largest difference, relative to the largest value of a module's output
CAST = 0.1  # the same after a conversion with --dtype

try:
    from ymplug_jax.convert import chat_check, mplug2_check, oracles
except ImportError as error:
    raise SourceError("--check: transformers is not installed; pip install transformers") from error


def check(model: str, files: list[Path], out: Path, wish: Wish) -> bool:
    """Print the largest relative difference of every module.

    Args:
      model: one of `plan.MODELS`.
      files: the source.
      out: the folder of the conversion.
      wish: options of the conversion.

    Returns:
      Whether all differences are within the tolerance.

    Raises:
      SourceError: the source cannot be compared.
      exits.Mistake: a parameter of the conversion is damaged.
    """
    verified(out)
    opened = open_source(model, files, wish)
    merged = open_source(model, files, wish._replace(keep_adapter=False))

    def read(name: str) -> torch.Tensor:
        return torch.from_numpy(np.array(merged.source.read(name), np.float32))

    rng = np.random.default_rng(0)
    theirs, ours = {
        "bloom": _bloom,
        "qwen": _qwen,
        "gpt3": _gpt3,
        "bert": _bert,
        "clip": _image_tower,
        "clip_chat": _clip_chat,
        "clip_mplug2": _clip_mplug2,
        "vit": _image_tower,
        "mplug_video": _mplug_video,
        "alpro": _alpro,
        "mplug_chat": _mplug_chat,
        "mplug2": _mplug2,
        "bert_mplug2": _bert_mplug2,
    }[model](opened, read, rng)
    expected = theirs()
    gc.collect()
    found = ours(_params(out, opened.plan.like))
    tolerance, worst = CAST if wish.dtype else TOLERANCE, 0.0
    for name, value in expected.items():
        if found[name].shape != value.shape:
            raise AssertionError(f"{name}: {found[name].shape} against {value.shape}")
        difference = float(np.abs(found[name] - value).max() / max(np.abs(value).max(), 1e-30))
        worst = max(worst, difference)
        print(f"{difference:.1e}  {name}" + ("" if difference <= tolerance else "  DIFFERS"), file=sys.stderr)
    print(f"check: {len(expected)} modules against PyTorch, largest relative difference {worst:.1e}")
    return worst <= tolerance


def _params(out: Path, like: Any) -> dict:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=place), like)
    return state.unflatten(stored_params.load_params(str(out), abstract))


M = TypeVar("M", bound=nn.Module)
Sides = tuple[Callable[[], dict[str, np.ndarray]], Callable[[dict], dict[str, np.ndarray]]]


def _module(opened: Opened, kind: type[M]) -> M:
    """The module of this class in the plan, which has one of each class."""
    found = opened.plan.model
    (module,) = (one for one in (found if isinstance(found, tuple) else (found,)) if isinstance(one, kind))
    return module


def _decoder(opened: Opened) -> LanguageModel:
    """The language model of a plan that holds nothing else."""
    model = opened.plan.model
    if not isinstance(model, LanguageModel):
        raise TypeError(f"{type(model).__name__} is not a language model")
    return model


def _applied(module: Any, params: dict, *args: Any) -> tuple[np.ndarray, dict]:
    with jax.default_matmul_precision("highest"):
        run = jax.jit(
            lambda p, *a: module.apply({"params": p}, *a, capture_intermediates=True, mutable="intermediates")
        )
        out, kept = run(params, *args)
    return np.asarray(out), kept["intermediates"]


def _blocks(kept: dict, last: str, before: str = "") -> dict[str, np.ndarray]:
    """States after each block of a scanned stack. The last one is left out if a norm named `last` follows it."""
    states = np.asarray(jax.tree.leaves(kept["blocks"]["__call__"])[0])
    return {f"{before}block {i}": states[i] for i in range(len(states) - bool(last))}


def _ids(rng: np.random.Generator, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    ids = rng.integers(1, vocab, (2, 9))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask


def _bloom(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    model = _decoder(opened)
    ids, mask = _ids(rng, model.vocab)
    return lambda: oracles.bloom(read, model, ids, mask), partial(_decoder_ours, model, ids, mask)


def _qwen(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    model, config = _decoder(opened), opened.config
    if config is None:
        raise SourceError("--check: no config.json beside the weights; download it with the weights")
    ids, mask = _ids(rng, model.vocab)
    return lambda: oracles.qwen(read, config.values, ids, mask), partial(_decoder_ours, model, ids, mask)


def _decoder_ours(model: LanguageModel, ids: np.ndarray, mask: np.ndarray, params: dict) -> dict[str, np.ndarray]:
    """States and logits of the language model under "llm", set to zero at padding."""
    embeds = model.apply({"params": params["llm"]}, ids, method="embed")
    hidden, kept = _applied(model, params["llm"], embeds, mask)
    logits = model.apply({"params": params["llm"]}, hidden, method="logits")
    found = {"embeddings": np.asarray(embeds), **_blocks(kept, "norm"), "norm": hidden, "logits": np.asarray(logits)}
    return {name: value * mask[..., None] for name, value in found.items()}


def _gpt3_ours(model: LanguageModel, params: dict, embeds: np.ndarray) -> dict[str, np.ndarray]:
    hidden, kept = _applied(model, params, embeds)
    first = embeds + np.asarray(params["pos_embed"])[: embeds.shape[1]]
    logits = model.apply({"params": params}, hidden, method="logits")
    return {"embeddings": first, **_blocks(kept, "norm"), "norm": hidden, "logits": np.asarray(logits)}


def _gpt3(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    model = _decoder(opened)
    embeds = rng.normal(scale=0.05, size=(2, 9, model.width)).astype(np.float32)
    return lambda: oracles.gpt3(read, model, embeds), lambda params: _gpt3_ours(model, params["llm"], embeds)


def _bert(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    text, fusion = _module(opened, Text), _module(opened, Fusion)
    if "mlm" not in opened.plan.like:
        raise SourceError("--check: this BERT has no masked-language-model head to compare; convert without --check")
    ids, mask = _ids(rng, text.vocab)

    def ours(params: dict) -> dict[str, np.ndarray]:
        embeddings = text.apply({"params": params["text"]}, ids, method="embed")
        states, kept = _applied(text, params["text"], ids, mask)
        found = _blocks(kept, "")
        last, kept = _applied(fusion, params["fusion"], states, mask)
        found |= {f"block {text.depth + i}": state for i, state in enumerate(_blocks(kept, "").values())}
        logits = MaskedHead().apply({"params": params["mlm"]}, last, params["text"]["token_embed"])
        return {"embeddings": np.asarray(embeddings), **found, "logits": np.asarray(logits)}

    return lambda: oracles.bert(read, text, ids, mask, text.depth + fusion.depth), ours


def _image_tower(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    """Compare on one frame: the temporal projection is initialised to zero, so temporal attention adds nothing."""
    model = _module(opened, TimeSformer)
    video = rng.normal(size=(1, 1, model.image_size, model.image_size, 3)).astype(np.float32)

    def ours(params: dict) -> dict[str, np.ndarray]:
        fresh = jax.jit(lambda: model.init(jax.random.key(0), jnp.zeros_like(video))["params"])()
        flat = state.flatten(fresh) | state.flatten(params["vision"])
        norm, kept = _applied(model, unflatten_dict({tuple(p.split("/")): leaf for p, leaf in flat.items()}), video)
        x, cls = kept["blocks"]["__call__"][0][0]
        blocks = np.concatenate([np.asarray(cls)[:, :, None], np.asarray(x)[:, :, 0]], axis=2)  # [layers, B, 1 + P, D]
        return {f"block {i}": block for i, block in enumerate(blocks)} | {"norm": norm}

    def theirs() -> dict[str, np.ndarray]:
        found = oracles.image_tower(read, model, video, opened.plan.layout)
        del found["embeddings"]
        return found

    return theirs, ours


def _mplug_video(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    model = _module(opened, MPLUGVideo)
    vision = model.vision
    video = rng.normal(size=(1, vision.frames, vision.image_size, vision.image_size, 3)).astype(np.float32)
    spoken = "llm" in opened.plan.like

    def theirs() -> dict[str, np.ndarray]:
        found = oracles.timesformer(read, vision, video, "visual_encoder.")
        found |= oracles.pool(read, model.abstractor.heads, found["vision norm"])
        if spoken:
            llm = oracles.gpt3(read, model.llm, found["connector"], "text_decoder.dist_model.language_model")
            found |= {f"llm {name}": value for name, value in llm.items()}
        return found

    def ours(params: dict) -> dict[str, np.ndarray]:
        tokens, kept = _applied(vision, params["vision"], video)
        x, cls = (np.asarray(part) for part in kept["blocks"]["__call__"][0][0])
        both = np.concatenate([cls[:, :, None], x.reshape(*cls.shape[:2], -1, cls.shape[-1])], axis=2)
        found = {f"vision block {i}": block for i, block in enumerate(both)} | {"vision norm": tokens}
        pooled, _ = _applied(model.abstractor, params["abstractor"], tokens)
        weights = params["connector"]["proj"]
        found |= {"abstractor": pooled, "connector": np.asarray(pooled @ weights["kernel"] + weights["bias"])}
        if spoken:
            llm = _gpt3_ours(model.llm, params["llm"], found["connector"])
            found |= {f"llm {name}": value for name, value in llm.items()}
        return found

    return theirs, ours


def _mplug_chat(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    return chat_check.sides(_module(opened, MPLUGChat), read, rng)


def _bert_mplug2(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    text = _module(opened, Text)
    return mplug2_check.bert_sides(text, opened.plan.layout, opened.plan.like, read, _ids(rng, text.vocab))


def _mplug2(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    form = mplug2_tables.form_named(opened.plan.layout)
    return mplug2_check.sides(_module(opened, MPLUG2), form, read, rng)


def _clip_chat(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    model = _module(opened, ClipViT)
    media = rng.normal(size=(2, 1, model.image_size, model.image_size, 3)).astype(np.float32)

    def ours(params: dict) -> dict[str, np.ndarray]:
        norm, kept = _applied(model, params["vision"], media)
        return {name: value[:, 0] for name, value in (_blocks(kept, "") | {"norm": norm}).items()}

    return lambda: chat_check.clip_tower(read, model, media, opened.plan.layout), ours


def _clip_mplug2(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    model = _module(opened, VideoClipViT)
    media = rng.normal(size=(2, 1, model.image_size, model.image_size, 3)).astype(np.float32)

    def ours(params: dict) -> dict[str, np.ndarray]:
        fresh = state.flatten(model.init(jax.random.key(0), media)["params"])  # its temporal modules add nothing
        tokens, kept = _applied(model, state.unflatten(fresh | state.flatten(params["vision"])), media)
        return {name: value[:, 0] for name, value in _blocks(kept, "").items()} | {"norm": tokens}

    return lambda: chat_check.clip_tower(read, model, media, opened.plan.layout, VIDEO_EPS), ours


def _alpro(opened: Opened, read: oracles.Read, rng: np.random.Generator) -> Sides:
    model, layout = _module(opened, ALPRO), opened.plan.layout
    vision = model.vision
    video = rng.normal(size=(2, vision.frames, vision.image_size, vision.image_size, 3)).astype(np.float32)
    ids, mask = _ids(rng, model.text.vocab)

    def ours(params: dict) -> dict[str, np.ndarray]:
        _, kept = _applied(vision, params["vision"], video)
        x, cls = (np.asarray(part) for part in kept["blocks"]["__call__"][0][0])
        both = np.concatenate([cls[:, :, None], x.reshape(*cls.shape[:2], -1, cls.shape[-1])], axis=2)
        found: dict[str, Any] = {f"vision block {i}": block for i, block in enumerate(both)}

        def read(run: ALPRO) -> dict[str, jax.Array]:
            seen = jnp.asarray(mask)
            tokens, states = run.encode_video(jnp.asarray(video)), run.encode_text(jnp.asarray(ids), seen)
            fused = run.fuse(states, seen, tokens)
            out = {"video tokens": tokens, "text states": states, "fused states": fused}
            if model.contrastive_width:
                out |= {"video vector": run.embed_video(tokens), "text vector": run.embed_text(states)}
            if model.matching:
                out["match logits"] = run.match_logits(fused)
            if model.masked:
                out["word logits"] = run.words(fused[:, : ids.shape[1]])
            if model.classes:
                out["class logits"] = run.classify(fused)
            return out

        with jax.default_matmul_precision("highest"):
            found |= cast(dict[str, jax.Array], model.apply({"params": params}, method=read))
        return {name: np.asarray(value) for name, value in found.items()}

    return lambda: oracles.alpro(read, model, layout, video, ids, mask), ours
