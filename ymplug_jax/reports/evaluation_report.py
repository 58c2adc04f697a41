"""Evaluation report: one self-contained HTML page with scores, loss curve, settings, classes and examples with frames."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from etils import epath

from ymplug_jax.core import config
from ymplug_jax.core.config import Experiment
from ymplug_jax.data.records import Split
from ymplug_jax.reports import classes, curves, examples, score_table
from ymplug_jax.reports.pictures import Pictures, data_uri
from ymplug_jax.tasks.presentation import Page, ReadableRow, Score

LONGEST = 400  # characters of a text on the page; longer texts are truncated
SAID = 10  # examples printed on the terminal
FACTS = ("task", "split", "step", "examples", "labelled", "search", "language", "note", "unlisted")


def write(
    path: epath.Path,
    scores: Mapping[str, Any],
    rows: Sequence[ReadableRow],
    records: Split | None,
    *,
    known: Sequence[Score],
    page: Page,
    experiment: Experiment | None = None,
    workdir: epath.Path | None = None,
) -> None:
    """Write the HTML report of an evaluation.

    Args:
      path: Path of the HTML file.
      scores: Values by score name.
      rows: Readable rows.
      records: Records of the split, for the frames; a row refers to its record by "index". None: no frames.
      known: Scores of the task.
      page: How the task's rows are shown.
      experiment: Settings to show; None: none.
      workdir: Folder of the run, for its loss curve and training command; None: neither is shown.
    """
    chance, votes = page.chance(scores, rows), page.votes if rows else {}
    lines = classes.table(rows, list(votes)) if votes else []
    text = render(
        "evaluation_report.html",
        facts={key: scores[key] for key in FACTS if key in scores},
        about=page.about(rows),
        groups=grouped(score_table.table(scores, known, chance.scores)),
        chance_notes=chance.notes,
        breakdowns=[table for table in page.breakdowns(scores) if table.rows],
        curve=_curve(workdir),
        settings=flat(config.settings_of(experiment)) if experiment else {},
        commands=_commands(workdir),
        matrices=[m for key, words in votes.items() if (m := classes.matrix(rows, key, words))],
        kinds=list(votes.values()),
        class_lines=lines[: classes.TABLE],
        class_count=len(lines),
        class_names=scores.get("classes"),
        sections=examples.sections(page, rows, Pictures(records).of),
        table=examples.table(page, rows),
        percent=lambda share: score_table.with_unit(None if share is None else 100 * share, "%"),
    )
    path.write_bytes(text.encode("utf-8", "replace"))  # a file name may contain bytes that are not UTF-8


def summary(scores: Mapping[str, Any], rows: Sequence[ReadableRow], *, known: Sequence[Score], page: Page) -> str:
    """Scores and first predictions as text for a terminal; arguments as for `write`."""
    chance = page.chance(scores, rows)
    head = (
        f"{scores.get('task')} on {scores.get('split')}: step {scores.get('step')}, {scores.get('examples')} examples"
    )
    if "labelled" in scores:
        head += f", {scores['labelled']} with ground truth"
    parts = [head, score_table.text(score_table.table(scores, known, chance.scores)), *chance.notes]
    if "note" in scores:
        parts.append(str(scores["note"]))
    table = examples.table(page, rows[:SAID])
    if table.rows:
        parts.append(f"\n{len(table.rows)} of {len(rows)} examples shown:")
        for cells in table.rows:
            named = zip(table.columns, cells, strict=True)
            parts.append("   ".join(f"{column}: {_cut(cell[0])}" for column, cell in named))
    return "\n".join(part for part in parts if part)


def summary_of_seeds(result: Mapping[str, Any], known: Sequence[Score]) -> str:
    """Mean and standard deviation of every score over several seeds, as text; `known` are the scores of the task."""
    spread = {name: value for name, value in result.items() if isinstance(value, Mapping)}
    means, deviations = (
        score_table.table({name: value[key] for name, value in spread.items()}, known) for key in ("mean", "std")
    )
    lines = [f"{result.get('task')} on {result.get('split')}, seeds {', '.join(map(str, result.get('seeds', [])))}:"]
    names = [f"{line.group}: {line.name}" if line.group else line.name for line in means]
    for name, mean, deviation in zip(names, means, deviations, strict=True):
        lines.append(f"{name:<{max(map(len, names))}}  {score_table.three_digits(mean.value)} ± {deviation.text}")
    return "\n".join(lines)


def render(name: str, **values: Any) -> str:
    """Render a template of this package. All `values` are escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cut": _cut, "cut_name": _cut_name}
    return environment.get_template(name).render(**values)


def _cut(text: Any) -> str:
    text = str(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _cut_name(text: Any) -> str:
    """Truncate a file name in the middle and keep its end."""
    text = str(text)
    return text if len(text) <= 160 else f"{text[:60]}…{text[-99:]}"


def grouped(lines: Sequence[score_table.Shown]) -> dict[str, list[score_table.Shown]]:
    """Scores by group, in order."""
    groups: dict[str, list[score_table.Shown]] = {}
    for line in lines:
        groups.setdefault(line.group, []).append(line)
    return groups


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to path -> value, with paths as on the command line."""
    if not isinstance(settings, Mapping):
        return {prefix: settings}
    return {
        path: leaf
        for key, value in settings.items()
        for path, leaf in flat(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def command_of(argv: Sequence[str]) -> str:
    """The command line as text that can be run again."""
    if not argv:
        return ""
    program = Path(argv[0])
    words = [f"ymplug_jax.{program.stem}"] if program.parent.name == "ymplug_jax" else None
    return shlex.join(["python", *(["-m", *words] if words else [str(program)]), *argv[1:]])


def _commands(workdir: epath.Path | None) -> dict[str, str]:
    """Label -> command: the training command, if the run's folder records it, and this evaluation."""
    commands = {}
    try:
        facts = json.loads((workdir / "environment.json").read_text(encoding="utf-8")) if workdir else {}
        commands["trained by"] = command_of([str(word) for word in facts["command"]])
    except (OSError, ValueError, KeyError, TypeError):  # not trained here, or by another version
        pass
    return commands | {"evaluated by": command_of(sys.argv)}


def _curve(workdir: epath.Path | None) -> str | None:
    if workdir is None:
        return None
    curve = curves.read(workdir)
    return None if curve.empty else data_uri(curves.picture({"": curve}), "png")
