"""BLOOM's greedy generation compared with Hugging Face's on the same random weights: `python -m benchmarks.bloom_generate`.

Both sides read the same prompts in float32 and write the same number of tokens, because no end token stops them. Their ids must
be equal before anything is timed. Prefill is the time to the first token, decoding the time of all later ones. The sides take
turns in one process, and every number is a median over the rounds.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig

from ymplug_jax.convert import bloom, rules
from ymplug_jax.core import state
from ymplug_jax.models import decode, language_models
from ymplug_jax.models.bloom import Bloom

SIZES = {
    "560m": Bloom(width=1024, depth=24, heads=16),
    "small": Bloom(vocab=32768, width=512, depth=8, heads=8),
}
SPREAD = 0.1  # of the random weights; wider than BLOOM's, so that the answers do not repeat one token


def theirs_of(lm: Bloom) -> BloomForCausalLM:
    """Hugging Face's model of these sizes with random float32 weights."""
    config = BloomConfig(
        vocab_size=lm.vocab, hidden_size=lm.width, n_layer=lm.depth, n_head=lm.heads,
        layer_norm_epsilon=lm.ln_eps, initializer_range=SPREAD, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    return BloomForCausalLM(config).eval()


def params_of(model: BloomForCausalLM, lm: Bloom) -> dict:
    """The same weights as parameters of `lm`."""
    entries = rules.expand(bloom.BLOOM, bloom.like_of(lm))
    leaves = {path: np.empty(leaf.shape, np.float32) for path, leaf in flatten_dict(bloom.like_of(lm), sep="/").items()}
    tensors = dict(model.named_parameters())
    for name, entry in entries.items():
        for path, layer, value in rules.pieces(entry, tensors[name].detach().numpy()):
            leaves[path][... if layer is None else layer] = value
    return state.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves.items()})


def sides(model: BloomForCausalLM, lm: Bloom, params: dict, ids: np.ndarray) -> dict[str, Callable[[int], np.ndarray]]:
    """Functions from a number of new tokens to ids int[B, new_tokens], of prompts int[B, S] without padding."""
    prompt = torch.from_numpy(ids)

    @torch.inference_mode()
    def theirs(new_tokens: int) -> np.ndarray:
        how = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=3
        )
        found = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=how)
        return found[:, prompt.shape[1] :].numpy()

    def run(params: dict, ids: jax.Array, new_tokens: int) -> jax.Array:
        lengths = jnp.full(len(ids), ids.shape[1], jnp.int32)
        return decode.greedy(
            lm, params, *decode.prompt_of(lm, params, None, ids, lengths), new_tokens=new_tokens, eos=-1
        ).ids

    compiled = jax.jit(run, static_argnums=2)
    params = language_models.for_steps(lm, params)  # as in a conversation
    return {"ours": lambda new: np.asarray(compiled(params, jnp.asarray(ids), new)), "theirs": theirs}


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def compare(lm: Bloom, batches: list[int], *, prompt: int, new_tokens: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each batch size.

    Returns:
      prefill (seconds, ours and theirs), tokens_per_second of decoding (ours and theirs), ratio (ours over theirs, median over the
      rounds), same_ids (share), distinct ids.
    """
    model = theirs_of(lm)
    params, rng, rows = params_of(model, lm), np.random.default_rng(0), []
    for batch in batches:
        both = sides(model, lm, params, rng.integers(4, lm.vocab, (batch, prompt)))
        answers = {name: {new: side(new) for new in (1, new_tokens)} for name, side in both.items()}
        times: dict[str, dict[int, list[float]]] = {name: {1: [], new_tokens: []} for name in both}
        for number in range(rounds):
            for name in list(both)[:: -1 if number % 2 else 1]:
                for new in (1, new_tokens):
                    times[name][new].append(timed(partial(both[name], new)))
        speed = {
            name: [batch * (new_tokens - 1) / (t - f) for f, t in zip(kept[1], kept[new_tokens], strict=True)]
            for name, kept in times.items()
        }
        row: dict[str, Any] = {"batch": batch, "prompt": prompt, "new_tokens": new_tokens}
        for name in both:
            row[f"{name} prefill"] = round(statistics.median(times[name][1]), 3)
            row[f"{name} tokens/s"] = round(statistics.median(speed[name]), 2)
        row["ratio"] = round(statistics.median(o / t for o, t in zip(speed["ours"], speed["theirs"], strict=True)), 3)
        row["ratios"] = [round(o / t, 3) for o, t in zip(speed["ours"], speed["theirs"], strict=True)]
        row["same_ids"] = float((answers["ours"][new_tokens] == answers["theirs"][new_tokens]).mean())
        row["distinct"] = len(np.unique(answers["ours"][new_tokens]))
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Run the comparison and fail if any id differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="560m")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads of PyTorch")
    rows = compare(SIZES[args.size], args.batches, prompt=args.prompt, new_tokens=args.new_tokens, rounds=args.rounds)
    if any(row["same_ids"] < 1 for row in rows):
        raise SystemExit("the ids differ")
    print(json.dumps({"size": args.size, "dtype": "float32", "rows": rows}))


if __name__ == "__main__":
    main()
