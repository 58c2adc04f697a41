"""Scores of video-text pairs that the model must read jointly, for all pairs or for the best candidates, in steps of one shape.

The encodings stay on the devices as `kept_rows.KeptRows`, and each step takes the rows of its pairs. Memory for S scores of V videos
and G texts:

    per host         S * V * G * 4 bytes of scores, V * G bytes for the mask of wanted pairs, and G rows of token ids
    per device       its shard of the kept rows, and 8 videos and 64 texts in float32 for one step

The kept rows are the largest part, ceil(N / B) * B * R / D bytes per device (see kept_rows.py). For example, 10,000 clips of 128 visual
tokens of width 2,048 in bfloat16 take 5.2 GB, or 0.33 GB on each of 16 devices.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core import progress, sharding
from ymplug_jax.core.state import Params
from ymplug_jax.tasks import kept_rows
from ymplug_jax.tasks.kept_rows import KeptRows

VIDEOS, TEXTS = 8, 8  # videos per step, texts per video
Arrays = dict[str, jax.Array]
# (params, videos {name: f[8, ...]}, 8 texts of each {name: [8, 8, ...]}) -> {name: f32[8, 8]}
Score = Callable[[Params, Arrays, Arrays], Arrays]


class Sides(NamedTuple):
    """The V videos and G texts that form the pairs."""

    kept_of_videos: tuple[str, ...]  # names of the kept predictions of a video
    videos: Sequence[int]  # positions of the V videos in the split
    kept_of_texts: tuple[str, ...]  # names of the kept predictions of a text
    texts: Sequence[int]  # positions of the G texts in the split
    small: dict[str, np.ndarray]  # inputs of the texts that are held on the host, [G, ...] each


def scores(
    score: Score, params: Params, kept: KeptRows, sides: Sides, wanted: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Score the wanted pairs: f32[V, G] by name, -inf for the other pairs.

    Args:
      score: Scores one step; it receives kept predictions in float32.
      params: Parameters of the model.
      kept: Kept predictions of the split.
      sides: The videos and texts.
      wanted: bool[V, G], the pairs to score.
      names: Names of the scores that `score` returns.
    """

    def step(params: Params, arrays: Arrays, videos: jax.Array, texts: jax.Array, small: Arrays) -> Arrays:
        def taken(kind: tuple[str, ...], rows: jax.Array) -> Arrays:
            return {name: kept_rows.take(arrays[name], rows, kept.mesh).astype(jnp.float32) for name in kind}

        return score(params, taken(sides.kept_of_videos, videos), taken(sides.kept_of_texts, texts) | small)

    run = jax.jit(step, out_shardings=sharding.replicated(kept.mesh))
    of_videos, of_texts = np.asarray(sides.videos, np.int32), np.asarray(sides.texts, np.int32)
    found = {name: np.full(wanted.shape, -np.inf, np.float32) for name in names}
    pieces = [
        (v, line[i : i + TEXTS])
        for v, line in enumerate(np.flatnonzero(row) for row in wanted)
        for i in range(0, len(line), TEXTS)
    ]
    hidden = jax.process_index() != 0
    for start in progress.bar(range(0, len(pieces), VIDEOS), desc="score pairs", unit="step", hidden=hidden):
        part = pieces[start : start + VIDEOS]
        full = part + [part[-1]] * (VIDEOS - len(part))  # one shape for all steps
        which = np.stack([np.pad(line, (0, TEXTS - len(line)), mode="edge") for _, line in full])
        shown = of_videos[[v for v, _ in full]]
        small = {name: values[which] for name, values in sides.small.items()}
        out = jax.device_get(run(params, kept.arrays, shown, of_texts[which], small))
        for i, (v, line) in enumerate(part):
            for name, matrix in found.items():
                matrix[v, line] = out[name][i, : len(line)]
    return found


def best_of(similarity: np.ndarray, best: int) -> np.ndarray:
    """Mask of the `best` texts of every video and the `best` videos of every text: f32[V, G] -> bool[V, G].

    Among equal similarities the first entries are taken.
    """
    return _best_of_row(similarity, best) | _best_of_row(similarity.T, best).T


def _best_of_row(similarity: np.ndarray, best: int) -> np.ndarray:
    keep = min(best, similarity.shape[1])
    least = -np.partition(-similarity, keep - 1, axis=1)[:, keep - 1 : keep]
    above, equal = similarity > least, similarity == least
    return above | (equal & (np.cumsum(equal, axis=1) <= keep - above.sum(axis=1, keepdims=True)))
