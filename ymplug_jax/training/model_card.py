"""`MODEL_CARD.md` in a run's folder: what the model is, its data, settings, weights, scores and limits.

The card is written when training starts and updated by every evaluation. It is Markdown, and sections that a person adds to it are kept.
Only process 0 writes. A card that cannot be written is a warning, because nothing depends on it.
"""

import dataclasses
import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ymplug_jax.core import checkpoint_files, config
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.checkpoint_files import BEST, place_of
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake, PlaceFailed
from ymplug_jax.data import schema
from ymplug_jax.data.source import folders_of
from ymplug_jax.reports import score_table
from ymplug_jax.reports.evaluation_report import command_of
from ymplug_jax.tasks import names, options
from ymplug_jax.training import best_step, environment, run_folder
from ymplug_jax.training.setup import Run

NAME = "MODEL_CARD.md"
CONVERSION = "conversion.json"
DURING = "### During training"
SIZES = (
    "kind", "vocab", "width", "depth", "heads", "kv_heads", "head_dim", "hidden", "lora_rank", "image_size", "patch_size", "frames",
    "queries",
)  # fmt: skip  # settings shown in the line of each part of the model


def begin(run: Run, workdir: epath.Path, origin: Mapping[str, str], step: int) -> None:
    """Write the card of a run that starts or resumes.

    Args:
      run: of the training.
      workdir: the run's folder, which holds its settings already.
      origin: parameter path -> where its value comes from, see `setup.initialise`.
      step: steps that are done. A resumed run keeps what the card says about the origin of the weights.
    """
    if jax.process_index() != 0:
        return
    old = _read(workdir)
    weights = old.get("Weights", "") if step else ""
    if step and not weights:
        known = f"The card was first written at step {step}; config.train.init_from of the run: "
        weights = f"{known}`{run.experiment.train.init_from or 'empty'}`."
    sections = {
        **old,
        "": f"# Model card of {_name(workdir)}\n\n`ymplug_jax` writes this card and updates it after each evaluation. All settings are in "
        f"`{run_folder.CONFIG}`.",
        "Model": _model(run),
        "Weights": weights or _weights(run, origin),
        "Data": _data(run.experiment),
        "Training": _training(run, workdir),
    }
    _write(workdir, _scored(run, workdir, sections, _during(old)))


def add_scores(run: Run, workdir: epath.Path, step: int, found: Mapping[str, float], *, best: bool) -> None:
    """Add the scores of an evaluation during training.

    Args:
      run: of the training.
      workdir: the run's folder.
      step: that was evaluated.
      found: name -> value of every score and loss.
      best: whether this step was kept in the run's folder `best`, which then gets a card of its own.
    """
    if jax.process_index() != 0:
        return
    sections = _read(workdir)
    rows = _during(sections) | {
        _label(line): (line.text, str(step)) for line in score_table.table(found, run.task.scores)
    }
    _write(workdir, _scored(run, workdir, sections, rows))
    if best:
        head = f"# Model card of {_name(workdir)}, step {step}\n\nThis folder holds the step with the best `{run.experiment.train.best}`. It shares "
        own = {**sections, "": f"{head}the frozen parameters of the run."}
        _write(workdir / BEST, _scored(run, workdir / BEST, own, rows))


def add_evaluation(run: Run, workdir: epath.Path) -> None:
    """Update the scores after `--mode eval`. A folder that holds no run gets no card."""
    if jax.process_index() != 0 or not (workdir / run_folder.CONFIG).exists():
        return
    sections = _read(workdir)
    if not sections:
        begin(run, workdir, {}, checkpoint_files.latest_step(str(workdir)) or 1)
        return
    _write(workdir, _scored(run, workdir, sections, _during(sections)))


def _name(workdir: epath.Path) -> str:
    return f"`{checkpoint_files.whole(str(workdir)).name}`"


def _model(run: Run) -> str:
    """Task, family, parts with their sizes, exact counts."""
    experiment = run.experiment
    trained, frozen = state_lib.count(run.state.trainable), state_lib.count(run.frozen)
    family = names.modules()[experiment.task].split(".")[-2]
    rows = [
        ("Task", f"`{experiment.task}`"),
        ("Model family", f"`{family}`"),
        ("Trained parameters", f"{trained:,}"),
        ("Frozen parameters", f"{frozen:,}" + (f", `{experiment.train.frozen_dtype}`" if frozen else "")),
        ("All parameters", f"{trained + frozen:,}"),
    ]
    settings = config.settings_of(experiment.model)
    for part, values in settings.items():
        if isinstance(values, Mapping):
            sizes = [f"{name} {values[name]}" for name in SIZES if values.get(name) not in (None, 0)]
            rows.append((f"`{part}`", ", ".join(sizes)))
    return _table(("", ""), rows)


def _weights(run: Run, origin: Mapping[str, str]) -> str:
    """Origin of each subtree, and what the folders of `init_from` record about theirs."""
    count: dict[tuple[str, ...], int] = defaultdict(int)
    for kind, tree in (("trained", run.state.trainable), ("frozen", run.frozen)):
        for path, leaf in state_lib.flatten(tree).items():
            source = origin.get(path, "fresh")
            source = f"random, seed {run.experiment.train.seed}" if source == "fresh" else f"`{source}`"
            count[path.split("/")[0], kind, str(leaf.dtype), source] += int(np.prod(leaf.shape))
    rows = [(f"`{key[0]}`", *key[1:3], f"{size:,}", key[3]) for key, size in sorted(count.items())]
    parts = [_table(("Subtree", "", "Type", "Parameters", "Initial values"), rows)]
    for subtree, stored_as, folder in checkpoint_files.sources(run.experiment.train.init_from):
        part = "" if stored_as == subtree else f"`{stored_as}` of " if stored_as else "all of "
        taken = f"`{subtree}`" if subtree else "All"
        parts.append(f"{taken} from {part}`{folder}`: {_source(checkpoint_files.folder_of(folder))}")
    return "\n\n".join(parts)


def _source(folder: epath.Path) -> str:
    """What a folder of `init_from` records about its parameters."""
    if not (folder / CONVERSION).exists():
        try:
            settings = run_folder.read_settings(folder)
        except Mistake:
            return "a checkpoint without settings"
        step = checkpoint_files.latest_step(str(folder))
        return (
            f"a run of task `{settings.task}`, step {step}, seed {settings.train.seed}; see its own card, if it has one"
        )
    try:
        record = json.loads((folder / CONVERSION).read_text(encoding="utf-8"))
        sources = "\n".join(
            f"- `{_cell(file)}`: SHA-256 `{digest}`" for file, digest in dict(record["sources"]).items()
        )
        text = f"a conversion of model `{record['model']}` by ymplug_jax {record['converter']} from\n\n{sources}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"a conversion whose {CONVERSION} cannot be read"
    return text + (f"\n- adapter: `{json.dumps(record['adapter'])}`" if record.get("adapter") else "")


def _data(experiment: Experiment) -> str:
    """The data sets by their manifests, or the text files."""
    data = experiment.data
    rows = [("Tokenizer", f"`{data.tokenizer}`")]
    rows += [("Class names", f"`{data.classes}`")] if data.classes else []
    folders = folders_of(data.path)
    weights = data.weights or ("by size",) * len(folders)
    if len(folders) > 1:
        rows += [(f"Weight of `{name}`", str(weight)) for name, weight in zip(folders, weights, strict=False)]
    first, *others = folders
    return "\n\n".join([_data_set(first, rows), *(_data_set(name, []) for name in others)])


def _data_set(path: str, rows: list[tuple[str, str]]) -> str:
    """One data set; `rows` are further rows of its table."""
    rows = [("Path", f"`{path}`"), *rows]
    file = _manifest_of(path)
    if file.is_file():
        rows.append((f"SHA-256 of `{file.name}`", f"`{environment.digest(file)}`"))
    if file.name != schema.MANIFEST:
        return _table(("", ""), rows)
    manifest = _json_in(file)
    if not manifest:
        rows.append((f"`{file.name}`", "missing or damaged: kind, splits and counts are unknown"))
        return _table(("", ""), rows)
    rows.append(("Kind", f"`{manifest.get('kind')}`"))
    if isinstance(frames := manifest.get("frames"), dict):
        rows.append(("Stored frames", ", ".join(f"{name} {value}" for name, value in frames.items())))
    splits = [
        (f"`{name}`", *(f"{own.get(key)}" for key in ("kind", "written", "rejected", "csv_sha256")))
        for name, own in _splits(manifest).items()
    ]
    head = ("Split", "Kind", "Records", "Rejected rows", "SHA-256 of the CSV")
    return _table(("", ""), rows) + (f"\n\n{_table(head, splits)}" if splits else "")


def _training(run: Run, workdir: epath.Path) -> str:
    """Length, seed, machines and versions, and every setting that is not the default."""
    train = run.experiment.train
    facts = _json_in(workdir / run_folder.ENVIRONMENT)
    length = f"`{train.duration}`"
    if run.total_steps:
        length += f": {run.total_steps:,} steps of {train.batch_size:,} examples; {run.examples:,} examples in split `{run.experiment.data.train_split}`"
    devices: list[str] = facts.get("devices", [])
    rows = [
        ("Duration", length),
        ("Seed", f"{train.seed}: initial values, order of the examples, augmentation, dropout"),
        ("Devices", ", ".join(f"{devices.count(kind)} x {kind}" for kind in dict.fromkeys(devices))),
        ("Processes", str(facts.get("processes", ""))),
        ("Mesh", ", ".join(f"{axis} {size}" for axis, size in run.mesh.shape.items())),
        ("Software", ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())),
        ("Python", f"{facts.get('python', '')}, {facts.get('platform', '')}"),
        ("Command", f"`{command_of([str(word) for word in facts.get('command', [])])}`"),
    ]
    changed = [
        (f"`config.{name}`", f"`{value!r}`", f"`{default!r}`") for name, value, default in _changed(run.experiment)
    ]
    return f"{_table(('', ''), rows)}\n\nSettings that differ from their defaults:\n\n{_table(('Setting', 'Value', 'Default'), changed)}"


def _changed(experiment: Experiment) -> Iterable[tuple[str, Any, Any]]:
    """(name, value, default) of the settings outside the model that differ from their defaults."""
    cls = options.class_of(experiment.task)
    given = dataclasses.replace(experiment, options=options.build(cls, experiment.options), model={})
    standard = config.settings_of(Experiment(experiment.task, {}, options=cls()))
    values, defaults = run_folder.leaves(config.settings_of(given)), run_folder.leaves(standard)
    return ((name, value, defaults.get(name)) for name, value in values.items() if value != defaults.get(name))


def _scored(
    run: Run, workdir: epath.Path, sections: Mapping[str, str], during: Mapping[str, tuple[str, str]]
) -> dict[str, str]:
    """The sections with scores and limits as they are now; `during` is label -> (value, step) of evaluations during training."""
    data, train, parts = run.experiment.data, run.experiment.train, []
    if during:
        parts.append(
            f"{DURING}\n\n{_table(('Score', 'Value', 'Step'), [(name, *row) for name, row in during.items()])}"
        )
    if best := _json_in(workdir / BEST / best_step.NOTE):
        parts.append(f"Best step: {best.get('step')}, `{best.get('score')}` {best.get('value')}, kept in `{BEST}/`.")
    evaluations = _evaluations(workdir)
    for split, scores in evaluations.items():
        head = f"### Split {split}: step {scores.get('step')}, {scores.get('examples')} examples"
        lines = score_table.table(scores, run.task.scores)
        note_below = f"\n\n{scores['note']}" if scores.get("note") else ""
        parts.append(
            f"{head}\n\n{_table(('Score', 'Value'), [(_label(line), line.text) for line in lines])}{note_below}"
        )
    limits = []
    if during:
        limits.append(
            f"Scores during training are those of the first {train.eval_examples:,} examples of split `{data.eval_split}` at most."
        )
    if open_splits := [name for name in _open_splits(data.path, evaluations) if name != data.train_split]:
        limits.append(f"Not scored with `--mode eval`: {', '.join(f'`{name}`' for name in open_splits)}.")
    limits += [
        "Scores measure agreement with the annotations of this data. Bias, safety and factual errors of the answers were not evaluated.",
        "The terms of use of the data apply to the model too; those of Youku-mPLUG come with the data set.",
    ]
    if train.init_from:
        limits.append(
            "The licences of the initial weights are not recorded here. Check them before you use or publish the model."
        )
    scores_text = "\n\n".join(parts) or "Nothing was evaluated yet."
    return {**sections, "Scores": scores_text, "Limits": "\n".join(f"- {limit}" for limit in limits)}


def _label(line: score_table.Shown) -> str:
    return f"{line.group}: {line.name}" if line.group else line.name


def _evaluations(workdir: epath.Path) -> dict[str, dict[str, Any]]:
    """Split -> scores.json of the run's evaluations."""
    folder = workdir / "eval"
    found = {}
    for place in sorted(folder.iterdir()) if folder.exists() else []:
        if scores := _json_in(place / "scores.json"):
            found[place.name] = scores
    return found


def _open_splits(path: str, evaluations: Mapping[str, Any]) -> list[str]:
    """Splits of the data sets without an evaluation."""
    found = [name for folder in folders_of(path) for name in _splits(_json_in(_manifest_of(folder)))]
    return [name for name in dict.fromkeys(found) if name not in evaluations]


def _manifest_of(path: str) -> epath.Path:
    """The file that identifies the data: manifest.json, or the text file itself."""
    file = checkpoint_files.folder_of(path)
    return file if path.endswith(".txt") else file / schema.MANIFEST


def _splits(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    splits = manifest.get("splits")
    return {name: own for name, own in splits.items() if isinstance(own, dict)} if isinstance(splits, dict) else {}


def _json_in(file: epath.Path) -> dict[str, Any]:
    """The object in a file; {} if the file is missing or damaged."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _during(sections: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Label -> (value, step) in the table of evaluations during training."""
    block = sections.get("Scores", "").partition(DURING)[2].partition("\n#")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines() if line.startswith("|")
    ]
    return {row[0].replace("\\|", "|"): (row[1], row[2]) for row in rows[2:] if len(row) == 3}


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _read(workdir: epath.Path) -> dict[str, str]:
    """Title -> body of the card's sections, "" for what stands before the first; {} if there is no card."""
    try:
        text = (workdir / NAME).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    head, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    titled = (part.partition("\n") for part in parts)
    return {"": head.strip()} | {title.strip(): body.strip() for title, _, body in titled}


def _write(workdir: epath.Path, sections: Mapping[str, str]) -> None:
    """Replace the card atomically."""
    parts = [sections.get("", ""), *(f"## {title}\n\n{body}" for title, body in sections.items() if title)]
    path = workdir / NAME
    try:
        with place_of(path):
            run_folder.write_whole(path, ("\n\n".join(parts) + "\n").encode("utf-8", "backslashreplace"))
    except PlaceFailed as error:
        logging.warning("%s", error)
