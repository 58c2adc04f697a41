"""Captions by ymplug_jax's decoder compared with Hugging Face's `generate`: `python -m benchmarks.torch_generate`.

A GPT-2 with 128 visual tokens and a start token as `inputs_embeds`, its own cache, sdpa attention; against `decode.greedy`
and `decode_beam.beam` of the same sizes and weights. No end token, so both write the same number of tokens. The ids of both
sides are compared before anything is timed. The last table sets the bytes that a token has to read (weights once, keys and
values of every row) against what this machine reads a second.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.torch_captioner import decoder_to_jax
from ymplug_jax.models import decode, decode_beam, layers
from ymplug_jax.models.gpt3 import GPT3

MODELS = {
    "small": GPT3(vocab=32768, width=512, depth=8, heads=8, max_positions=256),
    "1.3b": GPT3(vocab=51200, width=2048, depth=24, heads=32, max_positions=2048),
}
QUERIES, START = 128, 1


def generate(model: GPT2LMHeadModel, prefix: torch.Tensor, beams: int, new_tokens: int) -> np.ndarray:
    """f[B, Q, D] -> int[B, new_tokens]."""
    begin = torch.full((len(prefix), 1), START, device=prefix.device)
    embeds = torch.cat([prefix, model.transformer.wte(begin)], dim=1)  # [B, Q + 1, D]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=prefix.device)
    settings = GenerationConfig(
        max_new_tokens=new_tokens, num_beams=beams, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0
    )
    return model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=settings).cpu().numpy()


def ours(lm: GPT3, beams: int, new_tokens: int) -> Callable[[dict, jax.Array], jax.Array]:
    """(params, f[B, Q, D]) -> int32[B, new_tokens], compiled."""

    def run(params: dict, prefix: jax.Array) -> jax.Array:
        begin, ones = jnp.full((len(prefix), 1), START), jnp.ones(len(prefix), jnp.int32)
        search = decode.greedy if beams == 1 else partial(decode_beam.beam, beams=beams)
        with layers.unrolled(0):  # as in `predict`
            prompt = decode.prompt_of(lm, params, prefix, begin, ones)
            return search(lm, params, *prompt, new_tokens=new_tokens, eos=-1).ids

    return jax.jit(run)


def bytes_a_token(lm: GPT3, params: dict, batch: int, beams: int, new_tokens: int) -> int:
    """Minimum bytes read per step, on average: every weight once, keys and values of the past once per row, and those of the branches."""
    item = jnp.dtype(lm.dtype).itemsize
    weights = item * sum(leaf.size for leaf in jax.tree.leaves(params["blocks"])) + item * params["token_embed"].size
    position = 2 * lm.depth * lm.width * item
    return weights + batch * position * (QUERIES + 1 + beams * new_tokens // 2)


def read_speed() -> float:
    """Memory bandwidth in bytes per second, measured by a large sum on all cores."""
    x = jnp.ones(2**27, jnp.float32)  # 512 MiB
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    return x.nbytes / min(timed(lambda: total(x).block_until_ready()) for _ in range(5))


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


class Pair(NamedTuple):
    """One decoder in both frameworks with the same weights."""

    theirs: GPT2LMHeadModel
    params: dict  # of the JAX model


def decoders(lm: GPT3, device: str) -> Pair:
    """A random decoder with the sizes and dtype of `lm`: PyTorch's on `device`, JAX's on its first device."""
    config = GPT2Config(
        vocab_size=lm.vocab, n_positions=lm.max_positions, n_embd=lm.width, n_layer=lm.depth, n_head=lm.heads,
        attn_implementation="sdpa", initializer_range=0.06, bos_token_id=START, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        theirs = GPT2LMHeadModel(config).eval().to(getattr(torch, lm.dtype))
    return Pair(theirs, jax.tree.map(jnp.asarray, decoder_to_jax(theirs, lm)))


def compare(pair: Pair, lm: GPT3, *, beams: int, batch: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Caption `batch` random prefixes in both frameworks, timed in alternating order.

    Returns:
      seconds and their_seconds (medians; p10 and p90 beside them), ratio (theirs over ours, median over the rounds),
      tokens_per_second and theirs, same_ids (share), distinct ids, log_probability and theirs (mean over the tokens, both
      judged by our decoder reading whole rows), their_worst_token (see `judge`), bytes_a_second (least traffic over time).
    """
    rng = np.random.default_rng(0)
    prefix = torch.from_numpy(rng.normal(0, 1, (batch, QUERIES, lm.width)).astype("float32"))
    mine = jnp.asarray(prefix.numpy(), lm.dtype)
    prefix, run = prefix.to(pair.theirs.device, pair.theirs.dtype), ours(lm, beams, new_tokens)
    sides = {
        "ours": lambda: np.asarray(run(pair.params, mine)),
        "theirs": lambda: generate(pair.theirs, prefix, beams, new_tokens),
    }
    answers = {name: side() for name, side in sides.items()}  # the first call compiles
    judged = {name: judge(lm, pair.params, mine, jnp.asarray(ids)) for name, ids in answers.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            times[name].append(timed(sides[name]))
    median = {name: statistics.median(values) for name, values in times.items()}
    tokens, least = batch * new_tokens, bytes_a_token(lm, pair.params, batch, beams, new_tokens) * new_tokens
    return {
        "beams": beams,
        "batch": batch,
        "new_tokens": new_tokens,
        "seconds": median["ours"],
        "seconds_p10_p90": [float(x) for x in np.quantile(times["ours"], [0.1, 0.9])],
        "their_seconds": median["theirs"],
        "their_seconds_p10_p90": [float(x) for x in np.quantile(times["theirs"], [0.1, 0.9])],
        "ratio": statistics.median(t / o for t, o in zip(times["theirs"], times["ours"], strict=True)),
        "tokens_per_second": tokens / median["ours"],
        "theirs": tokens / median["theirs"],
        "same_ids": float((answers["ours"] == answers["theirs"]).mean()),
        "distinct": len(np.unique(answers["ours"])),
        "log_probability": float(judged["ours"][0]),
        "their_log_probability": float(judged["theirs"][0]),
        "their_worst_token": float(judged["theirs"][1]),
        "bytes_a_second": least / median["ours"],
    }


@partial(jax.jit, static_argnames="lm")
def judge(lm: GPT3, params: dict, prefix: jax.Array, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Score captions with the JAX decoder without a cache: f[B, Q, D], int[B, L] -> two numbers.

    Returns:
      mean log-probability of a token; and how far the logit of any token is below the best one, in standard deviations of the
      logits. The second is near zero for greedy captions of the same model, however rounding made them go on.
    """
    start = jnp.full((len(ids), 1), START, ids.dtype)
    embeds = lm.apply({"params": params}, jnp.concatenate([start, ids[:, :-1]], axis=1), method="embed")
    hidden = lm.apply({"params": params}, jnp.concatenate([prefix.astype(embeds.dtype), embeds], axis=1))
    logits = lm.apply({"params": params}, hidden[:, prefix.shape[1] :], method="logits").astype(
        jnp.float32
    )  # [B, L, V]
    told = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]  # [B, L]
    behind = (jnp.max(logits, axis=-1) - told) / jnp.std(logits, axis=-1)
    return jnp.mean(told - jax.nn.logsumexp(logits, axis=-1)), jnp.max(behind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(MODELS), default="small")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--new_tokens", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="PyTorch device, cpu or cuda; JAX uses its first device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    lm = MODELS[args.size].clone(dtype=args.dtype)
    pair = decoders(lm, args.device)
    speed = read_speed()
    print(f"{os.cpu_count()} cores, reads {speed / 1e9:.1f} GB/s")
    result = []
    for beams in args.beams:
        for batch in args.batches:
            row = compare(pair, lm, beams=beams, batch=batch, new_tokens=args.new_tokens, rounds=args.rounds)
            if args.dtype == "float32":
                assert row["same_ids"] > 0.98, (
                    f"beams {beams}, batch {batch}: only {row['same_ids']:.1%} of the ids agree"
                )
            row["of_read_speed"] = row["bytes_a_second"] / speed
            row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
            print(row, flush=True)
            result.append(row)
    print(json.dumps({"device": args.device, "dtype": args.dtype, "new_tokens": args.new_tokens, "rows": result}))


if __name__ == "__main__":
    main()
