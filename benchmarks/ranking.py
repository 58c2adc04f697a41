"""Time of ranking a full gallery compared with its matrix products: `python -m benchmarks.ranking [--sizes 5000 20000 50000] [--width 256]`.

For each size as many texts as videos, random unit vectors, one run: the similarities with nothing done to them, then
`ranking.rank` (ranks of the right entries and the ten best of each query), in turn and the faster of two each, so that
compiling does not count. The first 1,024 queries are compared with a plain stable sort in numpy. The last line on stdout is one
JSON object.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.tasks.common import ranking

CHUNK = 1024  # queries per matrix product, in both programs
CLOSE = 1e-5  # similarities that differ by less may swap ranks by rounding


def products(queries: np.ndarray, gallery: np.ndarray) -> None:
    """Compute all similarities in chunks and discard them."""
    step = jax.jit(lambda part, entries: jnp.einsum("ce,ge->cg", part, entries, precision="highest"))
    entries = jax.device_put(gallery)
    for start in range(0, len(queries), CHUNK):
        part = queries[start : start + CHUNK]
        step(np.pad(part, ((0, CHUNK - len(part)), (0, 0))), entries).block_until_ready()


def seconds(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def check(queries: np.ndarray, gallery: np.ndarray, found: tuple[np.ndarray, ...]) -> None:
    """Check the ranking of some queries against a stable sort, except entries that are equal up to rounding."""
    ranks, order, similarity = (part[: len(queries)] for part in found)
    scores = queries @ gallery.T
    expected = np.take_along_axis(scores, np.argsort(-scores, axis=1, kind="stable")[:, : order.shape[1]], axis=1)
    np.testing.assert_allclose(similarity, expected, atol=CLOSE)
    np.testing.assert_allclose(np.take_along_axis(scores, order, axis=1), expected, atol=CLOSE)
    own = np.diagonal(scores)[:, None]
    low, high = 1 + (scores > own + CLOSE).sum(axis=1), (scores > own - CLOSE).sum(axis=1)
    assert ((low <= ranks) & (ranks <= high)).all()


def measure(size: int, width: int) -> dict[str, float]:
    """Seconds of the products and of the ranking of `size` x `size`."""
    rng = np.random.default_rng(0)
    video, text = rng.normal(size=(2, size, width)).astype(np.float32)
    text += 0.1 * video  # so that ranks are spread
    video, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (video, text))
    ids, found = np.arange(size), []
    times: dict[str, list[float]] = {"products": [], "ranking": []}
    for _ in range(2):
        times["products"].append(seconds(lambda: products(text, video)))
        times["ranking"].append(seconds(lambda: found.append(ranking.rank(text, video, ids, ids, chunk=CHUNK))))
    check(text[:CHUNK], video, found[-1])
    best = {name: min(values) for name, values in times.items()}
    return {"size": size, **best, "ratio": best["ranking"] / best["products"]}


def main() -> None:
    """Print one line per size, then everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5_000, 20_000, 50_000])
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()
    rows = []
    for size in args.sizes:
        rows.append(measure(size, args.width))
        line = "{size:>6} squared: products {products:.2f} s, ranking {ranking:.2f} s, {ratio:.2f} times the products"
        print(line.format(**rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"devices": len(jax.devices()), "width": args.width, "rows": rows}))


if __name__ == "__main__":
    main()
