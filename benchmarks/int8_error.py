"""How much int8 weights change logits and loss of a decoder: `python -m benchmarks.int8_error`.

Random weights as at the start of a training, rounded to bfloat16 as checkpoints store them; the computation is float32. Random
ids have a loss near log V whatever the weights are, so the ids here are drawn from the unquantised model itself.
"""

import argparse
import json

import jax
import jax.numpy as jnp

from ymplug_jax.core import quantize
from ymplug_jax.models import language_model, language_models
from ymplug_jax.models.bloom import Bloom

SIZES = {"tiny": language_models.SIZES["bloom-tiny"], "560m": Bloom(width=1024, depth=24, heads=16)}


def measure(lm: Bloom, rows: int, length: int) -> dict[str, float]:
    """Differences between logits and losses with int8 and with bfloat16 weights, over ids int[rows, length]."""

    @jax.jit
    def make(key: jax.Array) -> dict:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), language_model.init(lm, key))

    @jax.jit
    def logits(params: dict, ids: jax.Array) -> jax.Array:
        return lm.apply({"params": params}, ids, method=lambda lm, ids: lm.logits(lm(lm.embed(ids))))

    params = make(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (rows, length), 0, lm.vocab)
    exact = logits(params, ids)  # [B, L, V]
    targets = jax.random.categorical(jax.random.key(2), exact)  # [B, L]
    held = logits(quantize.hold(params, language_models.axes_of(lm)), ids)

    def loss(found: jax.Array) -> float:
        picked = jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0]
        return float(jnp.mean(jax.nn.logsumexp(found, axis=-1) - picked))

    return {
        "logits_rms": float(jnp.std(exact)),
        "change_rms": float(jnp.sqrt(jnp.mean((held - exact) ** 2))),
        "change_max": float(jnp.max(jnp.abs(held - exact))),
        "same_first_token": float(jnp.mean(jnp.argmax(held, -1) == jnp.argmax(exact, -1))),
        "loss": loss(exact),
        "loss_int8": loss(held),
    }


def main() -> None:
    """Print one row for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    args = parser.parse_args()
    for name in args.sizes:
        found = measure(SIZES[name], args.rows, args.length)
        print(json.dumps({"size": name} | {key: float(f"{value:.4g}") for key, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
