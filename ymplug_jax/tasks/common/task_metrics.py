"""Classification and retrieval metrics, in percent except for ranks.

Ties count against the model: a wrong answer with the same score as the correct one ranks before it, so a collapsed model with equal
scores has the lowest recalls, not the highest. Several correct answers of one query do not tie with each other.
Scores that are not finite have no order and raise a Mistake.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.records import Split


def check_finite(values: np.ndarray, what: str, name: Callable[[int], str] = "row {}".format) -> None:
    """Check that all values are finite.

    Args:
      values: f[N, ...].
      what: Description of the values for the message.
      name: Maps a row number to its name in the message.

    Raises:
      Mistake: A row holds NaN or infinity; the message names the first such row.
    """
    values = np.asarray(values)
    bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1) if values.size else np.zeros(0, bool)
    if bad.any():
        first = int(bad.argmax())
        found = values[first][~np.isfinite(values[first])].flat[0]
        raise Mistake(
            f"{name(first)}: {what} is {found}, in {bad.sum()} of {len(bad)} rows, and nothing was scored; evaluate an earlier "
            "checkpoint or train again with a lower config.optim.lr"
        )


def check_rows(rows: Sequence[Mapping[str, Any]], records: Split, *keys: str) -> None:
    """Check that the predictions used for scoring are finite.

    Args:
      rows: Predictions of a task; "index" is the position in the split.
      records: Records of the split.
      keys: Names of the predictions to check, f[...] each.

    Raises:
      Mistake: A value is not finite; the message names the first such example by its video and its position in the split.
    """
    for key in keys:
        values = np.stack([np.asarray(row[key], np.float32) for row in rows])
        check_finite(values, f"the model's {key!r}", lambda i: example_name(rows[i], records))


def example_name(row: Mapping[str, Any], records: Split) -> str:
    """Name of an example in messages: its video and its position in the split."""
    index = int(row["index"])
    return f"{records[index].media_id} (example {index} of the split)"


def class_ranks(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank of each row's label, 1 is best: f[N, C], int[N] in 0..C-1 -> int[N]. Ties count against the label.

    Raises:
      Mistake: A score is not finite.
    """
    labels = np.asarray(labels)
    return ranks_in(scores, np.arange(np.shape(scores)[1]) == labels[:, None])


def top_k(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Percent of rows whose label is among the k highest scores: f[N, C], int[N] in 0..C-1. Ties count against the label.

    Raises:
      Mistake: A score is not finite.
    """
    return 100 * float(np.mean(class_ranks(scores, labels) <= k))


def order(scores: np.ndarray, label: int = -1) -> np.ndarray:
    """Columns by descending score: f[C] -> int[C].

    Ties are ordered by column number, but `label`, if given, comes after all columns that tie with it, so that its position
    agrees with `class_ranks`.
    """
    place = np.argsort(-np.asarray(scores), kind="stable")
    if label < 0:
        return place
    level = np.asarray(scores)[place]
    after = np.flatnonzero(level == scores[label])[-1]  # the last column that ties with it
    return np.insert(place[place != label], after, label)


def ranks_in(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Rank of each row's best correct column: f[N, G], bool[N, G] -> int[N].

    The rank is 1 + the number of wrong columns with an equal or higher score, so ties count against the model. It is G + 1 if
    no column is correct.

    Raises:
      Mistake: A score is not finite.
    """
    check_finite(scores, "the score")
    best = np.where(right, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + np.sum(~np.asarray(right) & (scores >= best), axis=1)


def recalls(video_to_text: np.ndarray, text_to_video: np.ndarray) -> dict[str, float]:
    """R@1, R@5, R@10, their mean, and mean and median rank for both directions, from ranks int[N] (1 is best)."""
    scores: dict[str, float] = {}
    for name, ranks in (("v2t", video_to_text), ("t2v", text_to_video)):
        for k in (1, 5, 10):
            scores[f"{name}_r{k}"] = 100 * float(np.mean(ranks <= k))
        scores[f"{name}_r_mean"] = float(np.mean([scores[f"{name}_r{k}"] for k in (1, 5, 10)]))
        scores[f"{name}_mean_rank"] = float(np.mean(ranks))
        scores[f"{name}_median_rank"] = float(np.median(ranks))
    scores["r_mean"] = (scores["v2t_r_mean"] + scores["t2v_r_mean"]) / 2
    return scores


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation (N - 1) of every score that all runs have; a score in groups is named GROUP/.../NAME."""
    flat = [dict(_flat(run)) for run in runs]
    names = [name for name in flat[0] if all(name in run for run in flat)]
    table = {name: np.array([run[name] for run in flat], float) for name in names}
    return {
        name: {"mean": float(values.mean()), "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0}
        for name, values in table.items()
    }


def _flat(scores: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in scores.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, float):
            yield f"{prefix}{name}", value
