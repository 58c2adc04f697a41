"""What grades say: scores of systems with bootstrap intervals over videos, paired differences, and agreement of graders."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import krippendorff
import numpy as np

from ymplug_jax.grading.grades import VALUES, Grades
from ymplug_jax.grading.sheets import GRADES, Key

LEVEL = 0.95  # of the intervals


def aggregate(key: Key, grades: Grades, *, samples: int, seed: int) -> dict[str, Any]:
    """Aggregate the grades of a sheet.

    The score of an answer is the mean of its grades over the graders (A 3, B 2, C 1, D 0). Intervals are 95 % percentile
    intervals of a bootstrap that draws whole videos, because questions about one video are not independent. They are None with a
    single video.

    Args:
      key: Key of the sheet.
      grades: Of all graders.
      samples: Number of bootstrap samples, at least 1.
      seed: Of the bootstrap, at least 0.

    Returns:
      "systems", "pairs", "categories" (the same for the questions of each category), "agreement", "graders" and counts, as
      scores.json of docs/chat_evaluation.md describes them.
    """
    scores = _by_system(key, grades)  # [G, Q, S]
    whole = np.arange(len(key.questions))
    found = {
        "sheet": key.sheet,
        "questions": len(key.questions),
        "answers": len(key.names),
        "videos": len({one.video for one in key.questions}),
        "samples": samples,
        "seed": seed,
        **_of(key, scores, whole, samples, seed),
        "agreement": agreement(grades.values),
        "graders": _graders(grades),
    }
    categories: dict[str, list[int]] = {}
    for place, question in enumerate(key.questions):
        categories.setdefault(question.category, []).append(place)
    found["categories"] = {
        name: {"questions": len(places), **_of(key, scores, np.array(places), samples, seed)}
        for name, places in sorted(categories.items())
    }
    return found


def _by_system(key: Key, grades: Grades) -> np.ndarray:
    """Grades of each system, f64[G, Q, S]; systems with the same answer share its grades."""
    made = np.zeros((len(grades.graders), len(key.questions), len(key.systems)))
    column = 0
    for place, entries in enumerate(key.entries):
        for entry in entries:
            for system in entry.systems:
                made[:, place, key.systems.index(system)] = grades.values[:, column]
            column += 1
    return made


def _of(key: Key, scores: np.ndarray, places: np.ndarray, samples: int, seed: int) -> dict[str, Any]:
    """Systems and pairs over the questions at `places`."""
    own = scores[:, places]  # [G, Q, S]
    mean = own.mean(axis=0)  # [Q, S]
    names = [key.questions[place].video for place in places]
    videos = {video: i for i, video in enumerate(dict.fromkeys(names))}
    of_video = np.array([videos[name] for name in names])
    draws = _draws(len(videos), samples, seed)
    systems = {}
    for s, system in enumerate(key.systems):
        counts = {grade: int(np.sum(own[:, :, s] == value)) for grade, value in reversed(VALUES.items())}
        good = (own[:, :, s] >= VALUES["B"]).mean(axis=0)
        systems[system] = {
            "mean": float(mean[:, s].mean()),
            "interval": _interval(mean[:, s], of_video, draws),
            "a_or_b": float(good.mean()),
            "a_or_b_interval": _interval(good, of_video, draws),
            "grades": counts,
        }
    pairs = []
    for a, b in combinations(range(len(key.systems)), 2):
        apart = mean[:, a] - mean[:, b]
        pairs.append(
            {
                "systems": [key.systems[a], key.systems[b]],
                "difference": float(apart.mean()),
                "interval": _interval(apart, of_video, draws),
                "better": int(np.sum(apart > 0)),
                "equal": int(np.sum(apart == 0)),
                "worse": int(np.sum(apart < 0)),
            }
        )
    return {"systems": systems, "pairs": pairs}


def _draws(videos: int, samples: int, seed: int) -> np.ndarray | None:
    """How often each bootstrap sample draws each video, f64[samples, videos]; None with a single video."""
    if videos < 2:
        return None
    rng = np.random.default_rng(seed)
    return rng.multinomial(videos, np.full(videos, 1 / videos), size=samples).astype(float)


def _interval(values: np.ndarray, of_video: np.ndarray, draws: np.ndarray | None) -> list[float] | None:
    """Percentile interval of the mean over questions, f64[Q] with the video of each question, int[Q]."""
    if draws is None:
        return None
    sums = np.bincount(of_video, weights=values, minlength=draws.shape[1])
    counts = np.bincount(of_video, minlength=draws.shape[1])
    means = (draws @ sums) / (draws @ counts)  # every video has a question, so no sample is empty
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return [float(low), float(high)]


def agreement(values: np.ndarray) -> dict[str, Any]:
    """Krippendorff's alpha for ordinal grades, f64[G, N], and the share of answers that all graders grade alike.

    Alpha is 1 for perfect agreement and 0 for agreement by chance. It is None where all grades are the same: without any variation
    it is not defined.
    """
    alike = float(np.mean(np.all(values == values[0], axis=0)))
    if len(np.unique(values)) < 2:
        return {"alpha": None, "all_alike": alike, "note": "all grades are the same, so alpha is not defined"}
    alpha = krippendorff.alpha(
        reliability_data=values, value_domain=list(VALUES.values()), level_of_measurement="ordinal"
    )
    return {"alpha": float(alpha), "all_alike": alike}


def _graders(grades: Grades) -> dict[str, Any]:
    """Of each grader: the mean grade, and how far it lies above the mean of the others on the same answers."""
    found = {}
    for g, grader in enumerate(grades.graders):
        rest = np.delete(grades.values, g, axis=0).mean()
        mean = float(grades.values[g].mean())
        counts = {grade: int(np.sum(grades.values[g] == value)) for grade, value in reversed(VALUES.items())}
        found[grader] = {"mean": mean, "above_others": mean - float(rest), "grades": counts}
    return found


def text(found: dict[str, Any]) -> str:
    """The results for a terminal."""
    lines = [
        f"{found['questions']} questions about {found['videos']} videos, {found['answers']} different answers, "
        f"{len(found['graders'])} graders; A 3, B 2, C 1, D 0; 95 % intervals over videos",
        *_systems(found),
    ]
    for name, own in found["categories"].items():
        if len(found["categories"]) > 1:
            lines += ["", f"{name}: {own['questions']} questions", *_systems(own)]
    alpha = found["agreement"]["alpha"]
    said = f"{alpha:.3f}" if alpha is not None else found["agreement"]["note"]
    lines += [
        "",
        f"agreement: ordinal alpha {said}; all graders alike on {100 * found['agreement']['all_alike']:.0f} %",
    ]
    lines += [
        f"  {name}: mean {own['mean']:.2f}, {own['above_others']:+.2f} against the others"
        for name, own in found["graders"].items()
    ]
    return "\n".join(lines)


def _systems(found: dict[str, Any]) -> list[str]:
    width = max(len(name) for name in found["systems"])
    lines = []
    for name, own in found["systems"].items():
        counts = "  ".join(f"{grade} {own['grades'][grade]}" for grade in GRADES)
        lines.append(
            f"  {name:<{width}}  {own['mean']:.2f} {_shown(own['interval'])}  {counts}  A or B {100 * own['a_or_b']:.0f} %"
        )
    for pair in found["pairs"]:
        a, b = pair["systems"]
        lines.append(
            f"  {a} - {b}: {pair['difference']:+.2f} {_shown(pair['interval'], '+')}; better {pair['better']}, equal "
            f"{pair['equal']}, worse {pair['worse']}"
        )
    return lines


def _shown(interval: Sequence[float] | None, sign: str = "") -> str:
    return "(one video: no interval)" if interval is None else f"[{interval[0]:{sign}.2f}, {interval[1]:{sign}.2f}]"
