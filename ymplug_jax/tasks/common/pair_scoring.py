"""Scores of many videos with many texts, where the model must see each pair: in pieces of one shape, all pairs or the best."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from ymplug_jax.core import progress

VIDEOS, TEXTS = 8, 8  # of one step
Step = Callable[[np.ndarray, dict[str, np.ndarray]], dict[str, jax.Array]]


def scores(
    step: Step, videos: Sequence[np.ndarray], texts: dict[str, np.ndarray], wanted: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Matrices of scores by name, f32[V, G] each; -inf where a pair was not wanted.

    Args:
      step: videos [8, ...] and of each 8 texts {name: [8, 8, ...]} -> {name: f32[8, 8]}.
      videos: V arrays of one shape.
      texts: arrays of G texts, [G, ...] each.
      wanted: bool[V, G], the pairs to score.
      names: what `step` returns.
    """
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
        out = step(np.stack([videos[v] for v, _ in full]), {name: values[which] for name, values in texts.items()})
        out = jax.device_get(out)
        for i, (v, line) in enumerate(part):
            for name, matrix in found.items():
                matrix[v, line] = out[name][i, : len(line)]
    return found


def best_of(similarity: np.ndarray, best: int) -> np.ndarray:
    """The `best` texts of every video and the `best` videos of every text: f32[V, G] -> bool[V, G]. Of equal ones those that
    come first are taken."""
    return _best_of_row(similarity, best) | _best_of_row(similarity.T, best).T


def _best_of_row(similarity: np.ndarray, best: int) -> np.ndarray:
    keep = min(best, similarity.shape[1])
    least = -np.partition(-similarity, keep - 1, axis=1)[:, keep - 1 : keep]
    above, equal = similarity > least, similarity == least
    return above | (equal & (np.cumsum(equal, axis=1) <= keep - above.sum(axis=1, keepdims=True)))
