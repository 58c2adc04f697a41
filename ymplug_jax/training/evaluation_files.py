"""The files of an evaluation: scores.json, predictions.jsonl and index.npz."""

import json
from typing import Any

import numpy as np
from etils import epath

from ymplug_jax.core import index_file
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.records import Split
from ymplug_jax.tasks.common import task_metrics
from ymplug_jax.tasks.task import Report


def check(scores: dict[str, Any], report: Report, records: Split) -> None:
    """Raise a `Mistake` that names the first score or row that is not finite: JSON has no NaN."""

    def wrong(value: Any) -> bool:
        if isinstance(value, dict):
            return any(wrong(part) for part in value.values())
        if isinstance(value, list | tuple):
            return any(wrong(part) for part in value)
        return isinstance(value, float | np.floating) and not np.isfinite(value)

    for name, value in scores.items():
        if wrong(value):
            raise Mistake(
                f"{scores['split']}: the score {name!r} is {value}, so nothing was written; evaluate an earlier checkpoint"
            )
    for row in report.rows:
        if bad := next((name for name, value in row.items() if wrong(value)), None):
            raise Mistake(
                f"{task_metrics.example_name(row, records)}: {bad!r} is {row[bad]}, so nothing was written; evaluate an earlier "
                "checkpoint"
            )


def write(folder: epath.Path, scores: dict[str, Any], report: Report) -> None:
    """Write the scores, the readable rows and, if there are any, the arrays of a report into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(_strict(row), ensure_ascii=False) + "\n" for row in report.rows)
    # File names may hold bytes that are not UTF-8: write them as JSON escapes.
    (folder / "predictions.jsonl").write_bytes("".join(lines).encode("utf-8", "backslashreplace"))
    if report.arrays:
        index_file.write(folder / "index.npz", report.arrays)
    text = json.dumps(_strict(scores), indent=2, ensure_ascii=False) + "\n"
    (folder / "scores.json").write_text(text, encoding="utf-8")


def _strict(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
