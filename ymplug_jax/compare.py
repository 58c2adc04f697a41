"""Compare several runs on one self-contained HTML page and as a table.

    python -m ymplug_jax.compare runs/classify runs/classify_lr3 --out compare.html

The page shows the scores side by side by task and split, with the best value marked, then the loss curves and the settings that
differ. The folder of a run with --seeds stands for the runs in it. Runs that differ only in the seed also get a mean and standard
deviation. A run without an evaluation appears with its curve and settings. `--json` prints the comparison as one JSON object on the
last line.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from etils import epath

from ymplug_jax.core import exits, place_copies, places
from ymplug_jax.core.exits import Mistake
from ymplug_jax.reports import curves, evaluation_report, score_table
from ymplug_jax.reports.pictures import data_uri
from ymplug_jax.tasks.presentation import Score

SEED = "train.seed"


class Run(NamedTuple):
    """Data of one run to compare."""

    name: str  # as given on the command line
    settings: dict[str, Any]  # path -> value
    scores: dict[str, dict[str, Any]]  # split -> scores.json
    curve: curves.Curve

    @property
    def task(self) -> str:
        """Name of the run's task."""
        return str(self.settings.get("task"))


class Line(NamedTuple):
    """One score of several runs."""

    group: str
    name: str
    texts: list[str]  # one per run
    values: list[float | None]  # in the shown unit
    best: list[bool]


class Group(NamedTuple):
    """Runs of one task evaluated on the same split."""

    task: str
    split: str
    runs: list[str]
    facts: dict[str, list[str]]  # "step" and "examples": one text per run
    lines: list[Line]
    note: str


class Quiet(argparse.ArgumentParser):
    """Argument parser that reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Raise a `Mistake`."""
        raise Mistake(f"{self.prog}: {message}; --help lists the flags")


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the given runs. Returns the exit code: 0, or 2 for an error in the command line."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    parser = Quiet(
        prog="python -m ymplug_jax.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run (its --workdir), local or gs://")
    parser.add_argument("--out", default="compare.html", help="HTML file to write (default compare.html)")
    parser.add_argument("--json", action="store_true", help="print the comparison as one JSON object on the last line")
    try:
        args = parser.parse_args(argv)
        runs = read(args.runs)
        out = places.place(args.out, "--out")
        _check_out(out)
        found = groups(runs)
        html = evaluation_report.render("compare.html", **_page(runs, found))
        try:
            places.write_bytes(out, html.encode("utf-8", "replace"))
        except OSError as error:
            raise Mistake(f"--out {out}: cannot be written ({error.strerror or error}); choose another file") from None
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        return exits.MISTAKE
    except exits.PlaceFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return exits.PLACE
    print(text(runs, found))
    print(f"\npage: {out}", flush=True)
    if args.json:
        print(json.dumps(as_json(runs, found), ensure_ascii=False), flush=True)
    return 0


def _check_out(out: epath.Path) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise Mistake(f"--out {out}: not the name of an HTML file; give a name that ends in .html")
    if out.is_dir():
        raise Mistake(f"--out {out}: a folder, not a file; give a file in it")
    if places.is_remote(out):
        with place_copies.failing():
            places.check_bucket(out)
    elif not out.parent.is_dir():
        raise Mistake(f"--out {out}: no such folder {out.parent}; create it first")


def read(names: Sequence[str]) -> list[Run]:
    """Read the runs in the given folders; the folder of a run with --seeds stands for the runs in it.

    Raises:
      Mistake: A folder holds no run, a file is damaged, or a run is given twice.
    """
    folders: dict[str, tuple[str, epath.Path]] = {}
    for name in names:
        for shown, folder in _folders(name):
            whole = str(folder) if places.is_remote(folder) else str(Path(folder).resolve())
            if whole in folders:
                raise Mistake(f"{shown}: the same run as {folders[whole][0]}; give each run once")
            folders[whole] = shown, folder
    return [_run(shown, folder) for shown, folder in folders.values()]


def _folders(name: str) -> list[tuple[str, epath.Path]]:
    folder = places.place(name, "RUN")
    if not folder.exists():
        raise Mistake(f"{name}: no such folder; give the --workdir of a run")
    if not folder.is_dir():
        raise Mistake(f"{name}: a file, not a folder; give the --workdir of a run")
    if (folder / "config.json").exists():
        return [(name.rstrip("/") or name, folder)]
    seeds = [one for one in folder.glob("seed_*") if (one / "config.json").exists()]
    seeds.sort(key=lambda one: (len(one.name), one.name))
    if not seeds:
        raise Mistake(f"{name}: no config.json here; give the --workdir of a run")
    return [(f"{name.rstrip('/')}/{one.name}", one) for one in seeds]


def _run(name: str, folder: epath.Path) -> Run:
    settings = evaluation_report.flat(_json(folder / "config.json"))
    files = sorted((folder / "eval").glob("*/scores.json")) if (folder / "eval").is_dir() else []
    return Run(name, settings, {file.parent.name: _json(file) for file in files}, curves.read(folder))


def _json(file: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError) as error:
        raise Mistake(f"{file}: damaged or unreadable ({error}); write it again or leave this run out") from None
    if not isinstance(found, dict):
        raise Mistake(f"{file}: holds no JSON object; write it again or leave this run out")
    return found


def groups(runs: Sequence[Run]) -> list[Group]:
    """Group the runs by task and split; only scores within a group are comparable."""
    keys = dict.fromkeys((run.task, split) for run in runs for split in run.scores)
    return [
        _group(task, split, [run for run in runs if run.task == task and split in run.scores]) for task, split in keys
    ]


def _group(task: str, split: str, runs: list[Run]) -> Group:
    from ymplug_jax.tasks import names  # imports all models, so only when scores are compared

    known = names.scores_of(task)
    tables = [
        {(line.group, line.name): line for line in score_table.table(_floats(run.scores[split], known), known)}
        for run in runs
    ]
    facts = {name: [str(run.scores[split].get(name, "–")) for run in runs] for name in ("step", "examples")}
    fair = len(set(facts["examples"])) == 1
    note = "" if fair else "The runs were scored on different numbers of examples: no best score is marked."
    if len({str(run.settings.get("data.path")) for run in runs}) > 1:
        note += (" " if note else "") + "The runs used different data (config.data.path)."
    lines = []
    for key in dict.fromkeys(key for table in tables for key in table):
        own = [table.get(key) for table in tables]
        values = [line.value if line else None for line in own]
        texts = [line.text if line else "–" for line in own]
        higher = next(line.higher_is_better for line in own if line)
        lines.append(Line(*key, texts, values, _best(values, higher if fair else None)))
    return Group(task, split, [run.name for run in runs], facts, lines, note)


def _floats(scores: dict[str, Any], known: Sequence[Score]) -> dict[str, Any]:
    """Convert scores stored as integers to floats."""
    named = {score.name for score in known}
    return {
        key: float(value) if key in named and isinstance(value, int) and not isinstance(value, bool) else value
        for key, value in scores.items()
    }


def _best(values: Sequence[float | None], higher: bool | None) -> list[bool]:
    """Mark the best values. None is marked if all are equal or `higher` is None (not comparable)."""
    known = [value for value in values if value is not None]
    if higher is None or len(set(known)) < 2:
        return [False] * len(values)
    best = max(known) if higher else min(known)
    return [value == best for value in values]


def differing(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Settings that differ between the runs, and always the seed."""
    paths = dict.fromkeys(path for run in runs for path in run.settings)
    shown = {}
    for path in paths:
        texts = [json.dumps(run.settings[path], ensure_ascii=False) if path in run.settings else "–" for run in runs]
        if path == SEED or len(set(texts)) > 1:
            shown[path] = texts
    return shown


def over_seeds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Groups of runs that differ only in the seed, with mean and sample standard deviation of their scores per split."""
    import numpy as np

    alike: dict[str, list[Run]] = {}
    for run in runs:
        rest = {path: value for path, value in run.settings.items() if path != SEED}
        alike.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    made = []
    for several in alike.values():
        if len(several) < 2:
            continue
        for group in groups(several):
            if len(group.runs) < 2 or group.note:
                continue
            rows = []
            for line in group.lines:
                if None in line.values:
                    continue
                values = np.array(line.values, float)
                unit = line.texts[0].rpartition(" ")[2] if " " in line.texts[0] else ""
                mean, deviation = float(values.mean()), float(values.std(ddof=1))
                shown = f"{score_table.three_digits(mean)} ± {score_table.with_unit(deviation, unit)}"
                rows.append({"group": line.group, "name": line.name, "mean": mean, "std": deviation, "text": shown})
            seeds = [run.settings.get(SEED) for run in several if run.name in group.runs]
            made.append({"runs": group.runs, "seeds": seeds, "task": group.task, "split": group.split, "rows": rows})
    return made


def _page(runs: Sequence[Run], found: Sequence[Group]) -> dict[str, Any]:
    names = short([run.name for run in runs])
    drawn = {names[run.name]: run.curve for run in runs if not run.curve.empty}
    return {
        "runs": runs,
        "names": names,
        "groups": found,
        "settings": differing(runs),
        "setting_count": len({path for run in runs for path in run.settings}),
        "seeds": over_seeds(runs),
        "curve": data_uri(curves.picture(drawn, width=10.0), "png") if drawn else None,
        "without_curve": [run.name for run in runs if run.curve.empty],
        "without_scores": [run.name for run in runs if not run.scores],
    }


def short(names: Sequence[str]) -> dict[str, str]:
    """Shorten names by the parent folders that all of them share."""
    parts = [name.split("/") for name in names]
    shared = 0
    while len(names) > 1 and all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    made = {name: "/".join(p[shared:]) for name, p in zip(names, parts, strict=True)}
    assert all(made[a] != made[b] for a, b in combinations(made, 2))
    return made


def text(runs: Sequence[Run], found: Sequence[Group]) -> str:
    """Format the comparison for a terminal; * marks the best value."""
    names = short([run.name for run in runs])
    parts = []
    for group in found:
        head = [f"{group.task} on {group.split}", *(names[name] for name in group.runs)]
        rows = [[name, *texts] for name, texts in group.facts.items()]
        for line in group.lines:
            cells = [value + (" *" if best else "  ") for value, best in zip(line.texts, line.best, strict=True)]
            rows.append([f"{line.group}: {line.name}" if line.group else line.name, *cells])
        parts.append(_columns([head, *rows]) + (f"\n{group.note}" if group.note else ""))
    for one in over_seeds(runs):
        means = [
            [f"{row['group']}: {row['name']}" if row["group"] else row["name"], row["text"]] for row in one["rows"]
        ]
        name = f"{one['task']} on {one['split']}, seeds {', '.join(map(str, one['seeds']))}"
        parts.append(_columns([[name, "mean and standard deviation"], *means]))
    parts += [f"{run.name}: no evaluation yet; run --mode eval" for run in runs if not run.scores]
    if len(runs) > 1:
        rows = [[f"config.{path}", *map(_brief, texts)] for path, texts in differing(runs).items()]
        parts.append(_columns([["settings that differ", *names.values()], *rows]))
    return "\n\n".join(parts)


def _brief(text: str, most: int = 30) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as aligned columns, by the width of characters on a terminal."""
    widths = [max(score_table.columns_of(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell + " " * (width - score_table.columns_of(cell))
            if i == 0
            else " " * (width - score_table.columns_of(cell)) + cell
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_json(runs: Sequence[Run], found: Sequence[Group]) -> dict[str, Any]:
    """The comparison for programs; scores are those of scores.json."""
    return {
        "runs": [
            {"name": run.name, "task": run.task, "seed": run.settings.get(SEED), "eval": run.scores} for run in runs
        ],
        "best": [
            {
                "task": group.task,
                "split": group.split,
                "score": f"{line.group}: {line.name}" if line.group else line.name,
                "runs": [name for name, best in zip(group.runs, line.best, strict=True) if best],
            }
            for group in found
            for line in group.lines
            if any(line.best)
        ],
        "differ": differing(runs),
    }


if __name__ == "__main__":
    sys.exit(main())
