"""Captions by our decoder against Hugging Face's `generate`, in turn: `python -m benchmarks.torch_generate`.

A GPT-2 with 128 visual tokens and a start token as `inputs_embeds`, its own cache, sdpa attention; against `decode.greedy`
and `decode.beam` of the same sizes and weights. No end token, so both write the same number of tokens. The ids of both
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

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from benchmarks.torch_step import decoder_to_jax
from ymplug_jax.models import decode
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
        search = decode.greedy if beams == 1 else partial(decode.beam, beams=beams)
        prompt = decode.prompt_of(lm, params, prefix, begin, ones)
        return search(lm, params, *prompt, new_tokens=new_tokens, eos=-1).ids

    return jax.jit(run)


def bytes_a_token(lm: GPT3, params: dict, batch: int, beams: int, new_tokens: int) -> int:
    """Least traffic of one step on average: every weight once, the keys and values of the past once a row, those of branches."""
    item = jnp.dtype(lm.dtype).itemsize
    weights = item * sum(leaf.size for leaf in jax.tree.leaves(params["blocks"])) + item * params["token_embed"].size
    position = 2 * lm.depth * lm.width * item
    return weights + batch * position * (QUERIES + 1 + beams * new_tokens // 2)


def read_speed() -> float:
    """Bytes a second of a large sum on all cores, in this run."""
    x = jnp.ones(2**27, jnp.float32)  # 512 MiB
    total = jax.jit(jnp.sum)
    total(x).block_until_ready()
    return x.nbytes / min(timed(lambda: total(x).block_until_ready()) for _ in range(5))


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(MODELS), default="small")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--new_tokens", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="of PyTorch: cpu or cuda; JAX takes its first device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    lm = MODELS[args.size].clone(dtype=args.dtype)
    config = GPT2Config(
        vocab_size=lm.vocab, n_positions=lm.max_positions, n_embd=lm.width, n_layer=lm.depth, n_head=lm.heads,
        attn_implementation="sdpa", initializer_range=0.06, bos_token_id=START, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, args.dtype), decoder_to_jax(model, lm))
    model = model.to(args.device, getattr(torch, args.dtype))
    rng = np.random.default_rng(0)
    speed = read_speed()
    print(f"{os.cpu_count()} cores, reads {speed / 1e9:.1f} GB/s")
    result = []
    for beams in args.beams:
        for batch in args.batches:
            prefix = rng.normal(0, 1, (batch, QUERIES, lm.width)).astype("float32")
            theirs = torch.from_numpy(prefix).to(args.device, getattr(torch, args.dtype))
            mine, run = jnp.asarray(prefix, args.dtype), ours(lm, beams, args.new_tokens)
            sides = {
                "ours": lambda run=run, mine=mine: np.asarray(run(params, mine)),
                "Hugging Face": lambda theirs=theirs, beams=beams: generate(model, theirs, beams, args.new_tokens),
            }
            answers = {name: side() for name, side in sides.items()}  # compiles, too
            same = float((answers["ours"] == answers["Hugging Face"]).mean())
            if args.dtype == "float32":
                assert same > 0.98, f"beams {beams}, batch {batch}: only {same:.1%} of the ids agree"
            times = {name: [] for name in sides}
            for _ in range(args.rounds):
                for name, side in sides.items():
                    times[name].append(timed(side))
            tokens = batch * args.new_tokens
            ratio = statistics.median(t / o for t, o in zip(times["Hugging Face"], times["ours"], strict=True))
            median = {name: statistics.median(values) for name, values in times.items()}
            least = bytes_a_token(lm, params, batch, beams, args.new_tokens) * args.new_tokens
            row = {
                "beams": beams, "batch": batch, "same_ids": round(same, 4), "ratio": round(ratio, 2),
                "tokens_per_second": round(tokens / median["ours"], 1),
                "theirs": round(tokens / median["Hugging Face"], 1),
                "distinct": len(np.unique(answers["ours"])),
                "gb_a_second": round(least / median["ours"] / 1e9, 2), "of_read_speed": round(least / median["ours"] / speed, 3),
            }  # fmt: skip
            print(row, flush=True)
            result.append(row)
    print(json.dumps({"device": args.device, "dtype": args.dtype, "new_tokens": args.new_tokens, "rows": result}))


if __name__ == "__main__":
    main()
