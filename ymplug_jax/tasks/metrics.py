"""Classification and retrieval metrics, all in percent but the ranks."""

from collections.abc import Mapping

import numpy as np


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Percent of rows whose label is among the k highest scores: f[N, C], int[N] in 0..C-1."""
    right = np.take_along_axis(scores, labels[:, None], axis=1)
    better = np.sum(scores > right, axis=1)
    # Of equal scores the first class wins, as a sort would have it.
    before = np.sum((scores == right) & (np.arange(scores.shape[1]) < labels[:, None]), axis=1)
    return 100 * float(np.mean(better + before < k))


def ranks_in(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rank, 1 the best, of each row's best right column: f[N, G], bool[N, G] -> int[N]."""
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + np.sum(scores > best, axis=1)


def recalls(video_to_text: np.ndarray, text_to_video: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10, mean and median rank of both directions, and the means of the recalls: ranks int[N], 1 the best."""
    scores: dict[str, float] = {}
    for name, ranks in (("v2t", video_to_text), ("t2v", text_to_video)):
        for k in (1, 5, 10):
            scores[f"{name}_r{k}"] = 100 * float(np.mean(ranks <= k))
        scores[f"{name}_r_mean"] = float(np.mean([scores[f"{name}_r{k}"] for k in (1, 5, 10)]))
        scores[f"{name}_mean_rank"] = float(np.mean(ranks))
        scores[f"{name}_median_rank"] = float(np.median(ranks))
    scores["r_mean"] = (scores["v2t_r_mean"] + scores["t2v_r_mean"]) / 2
    return scores


def over_seeds(runs: list[Mapping[str, object]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (of a sample, N - 1) of every number that all runs have."""
    names = [name for name, value in runs[0].items() if isinstance(value, float) and all(name in run for run in runs)]
    table = {name: np.array([run[name] for run in runs], float) for name in names}
    return {
        name: {"mean": float(values.mean()), "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0}
        for name, values in table.items()
    }
