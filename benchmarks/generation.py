"""Captioning with cached keys and values against computing the prefix again for every token, and the scoring of 45 class
names from one reading of video and prompt against 45 whole rows: `python -m benchmarks.generation`.

Both methods use the same weights and inputs, run alternately in one process, and must give the same answers before they are
timed. As in the recipes there are 128 visual tokens, a title of full length and 100 new tokens; the decoder is small. The slow
methods are implemented fairly: recomputation grows its row in steps of 32 positions, and whole rows compute logits at text
positions only.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.models import decode
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.tasks.common import candidates, losses

LM = GPT3(vocab=8192, width=512, depth=8, heads=8, max_positions=512)
QUERIES, ROW, PROMPT, CLASSES, NEW = 128, 80, 72, 45, 100
STEP = 32  # positions by which a recomputed row grows


def caption_recomputing(params: dict, prefix: jax.Array, eos: int) -> jax.Array:
    """Greedy captions without a cache: f[B, Q, D] -> int32[B, NEW]."""
    rows = jnp.zeros((prefix.shape[0], NEW + STEP), jnp.int32)
    for position in range(NEW):
        width = -(-(position + 1) // STEP) * STEP
        rows = _append(params, prefix, rows, jnp.int32(position), width)
    return rows[:, 1 : NEW + 1]


@partial(jax.jit, static_argnames="width")
def _append(params: dict, prefix: jax.Array, rows: jax.Array, position: jax.Array, width: int) -> jax.Array:
    embeds = LM.apply({"params": params}, rows[:, :width], method="embed")
    hidden = LM.apply({"params": params}, jnp.concatenate([prefix, embeds], axis=1))
    last = jax.lax.dynamic_index_in_dim(hidden, QUERIES + position, axis=1, keepdims=False)
    token = jnp.argmax(LM.apply({"params": params}, last, method="logits"), axis=-1).astype(jnp.int32)
    return jax.lax.dynamic_update_slice(rows, token[:, None], (0, position + 1))


@partial(jax.jit, static_argnames="eos")
def caption_cached(params: dict, prefix: jax.Array, eos: int) -> jax.Array:
    """Greedy captions with the cache."""
    begin = jnp.zeros((prefix.shape[0], 1), jnp.int32)
    ones = jnp.ones(prefix.shape[0], jnp.int32)
    prompt = decode.prompt_of(LM, params, prefix, begin, ones)
    return decode.greedy(LM, params, *prompt, new_tokens=NEW, eos=eos).ids


@jax.jit
def score_whole_rows(params: dict, prefix: jax.Array, ids: jax.Array, mask: jax.Array, lengths: jax.Array) -> jax.Array:
    """f[1, Q, D], int32[C, L], int32[C, L], int32[C] -> f32[C]."""
    embeds = LM.apply({"params": params}, ids, method="embed")
    every = jnp.broadcast_to(prefix, (ids.shape[0], *prefix.shape[1:]))
    hidden = LM.apply({"params": params}, jnp.concatenate([every, embeds], axis=1))
    logits = LM.apply({"params": params}, hidden[:, QUERIES:-1], method="logits")
    return jnp.sum(jnp.where(losses.target_mask(mask, lengths), -losses.token_losses(logits, ids[:, 1:]), 0), axis=1)


def timed(run: Callable[[], jax.Array]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--videos", type=int, default=4, help="videos per batch")
    args = parser.parse_args()
    params = jax.jit(LM.init)(jax.random.key(0), jnp.zeros((1, 1, LM.width)))["params"]
    rng = np.random.default_rng(0)
    prefix = jnp.asarray(rng.normal(0, 0.02, (args.videos, QUERIES, LM.width)), "float32")

    prompt = rng.integers(3, LM.vocab, PROMPT)
    ids, mask = np.zeros((CLASSES, ROW), np.int32), np.zeros((CLASSES, ROW), np.int32)
    for row in range(CLASSES):
        text = [1, *prompt, *rng.integers(3, LM.vocab, rng.integers(2, 6)), 2]
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    lengths = np.full(CLASSES, PROMPT, np.int32)
    batch = candidates.split(ids, mask, lengths, int(mask.sum(axis=1).max()) - PROMPT - 1)
    batch = {key: jnp.asarray(value)[None] for key, value in batch.items()}
    fast = jax.jit(partial(candidates.scores, LM))
    sides = {
        "captions, cached": lambda: caption_cached(params, prefix, -1),
        "captions, recomputed": lambda: caption_recomputing(params, prefix, -1),
        "45 classes, branches": lambda: fast(params, prefix[:1], batch),
        "45 classes, whole rows": lambda: score_whole_rows(params, prefix[:1], ids, mask, lengths),
    }
    answers = {name: np.asarray(run()) for name, run in sides.items()}  # the first call compiles
    assert (answers["captions, cached"] == answers["captions, recomputed"]).mean() > 0.98  # ties may fall either way
    np.testing.assert_allclose(answers["45 classes, branches"][0], answers["45 classes, whole rows"], rtol=1e-4)
    seconds = {name: statistics.median(times) for name, times in _rounds(sides, args.rounds).items()}
    for name, value in seconds.items():
        print(f"{name:<24} {1000 * value:8.1f} ms")
    caption = seconds["captions, recomputed"] / seconds["captions, cached"]
    classes = seconds["45 classes, whole rows"] / seconds["45 classes, branches"]
    print(json.dumps({"captions": round(caption, 1), "classes": round(classes, 1), "rounds": args.rounds}))


def _rounds(sides: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(timed(run))
    return times


if __name__ == "__main__":
    main()
