"""The files of a run folder beside its checkpoints: config.json, environment.json, tokenizer/ and classes.txt.

The copies of the tokenizer and the class names never change, because they define the meaning of token ids and label indices.
The checks run first and write nothing; `write` is called once a run has passed them.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from etils import epath

from ymplug_jax.core import checkpoint_files, config, places
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.tasks import options
from ymplug_jax.tasks.common import preprocess
from ymplug_jax.training import environment

CONFIG = "config.json"
ENVIRONMENT = environment.FILE
TOKENIZER, CLASSES = environment.TOKENIZER, environment.CLASSES
# Orbax globs the full path for the parts of a checkpoint, so these characters would act as patterns or escapes.
UNREADABLE = "[*?\\\0"
# Model settings that may change on resume: they affect computation or regularization, not the meaning of parameters.
FREE = ("remat", "dropout", "dtype", "lora_dropout")


def read_settings(workdir: str | epath.Path) -> Experiment:
    """Return the settings stored in the folder of a run.

    Raises:
      Mistake: config.json is missing, unreadable or damaged.
    """
    path = checkpoint_files.folder_of(str(workdir)) / CONFIG
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Mistake(f"{path.parent}: no {CONFIG} here; give the --workdir of a run") from None
    except OSError as error:
        raise Mistake(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from None
    fix = "restore a copy, or delete the file and pass --config and all settings again"
    try:
        plain = json.loads(text.decode("utf-8-sig"))
    except ValueError as error:  # includes UnicodeDecodeError and JSONDecodeError
        where = "the file is empty" if not text.strip() else str(error)
        raise Mistake(f"{path}: damaged, not JSON ({where}); {fix}") from None
    try:
        experiment = options.completed(config.from_config_dict(plain), stored=True)
    except (ValueError, TypeError, AttributeError) as error:
        what = error if isinstance(error, ValueError) else f"not the settings of a run ({error})"
        raise Mistake(f"{path}: damaged, or of another version: {what}; {fix}") from None
    if not isinstance(experiment.model, dict):
        raise Mistake(f"{path}: damaged, config.model is {experiment.model!r}, not a group of settings; {fix}")
    return experiment


def check(experiment: Experiment, workdir: str | epath.Path) -> None:
    """Check that a run with these settings can start or resume in this folder. Changes nothing on disk.

    Raises:
      Mistake: the folder is unusable, or it holds a run with another task, model, tokenizer or list of classes.
    """
    folder = checkpoint_files.whole(str(workdir))
    _check_place(folder)
    if (folder / CONFIG).exists():
        old = read_settings(folder)
        environment.check(folder)
        _check_same_run(old, experiment, folder)
        _check_same_tokenizer(old, experiment, folder)
        _check_same_classes(old, experiment, folder)
        return
    if checkpoint_files.latest_step(str(folder)) is not None:  # config.json was deleted
        _check_same_tokenizer(experiment, experiment, folder)
        if (folder / CLASSES).exists():
            _check_same_classes(experiment, experiment, folder)
    if experiment.data.classes:
        preprocess.class_names(experiment.data)


def check_no_conversion(workdir: str | epath.Path) -> None:
    """Check that the folder does not hold converted parameters, which a run would mix with its own.

    Raises:
      Mistake: the folder holds a conversion.
    """
    if (checkpoint_files.whole(str(workdir)) / "checkpoints" / checkpoint_files.CONVERTED).exists():
        raise Mistake(
            f"--workdir {workdir}: holds a conversion, and training in it would mix two sets of parameters; choose another folder and "
            f"start from this one with --config.train.init_from={workdir}"
        )


def _check_place(folder: epath.Path) -> None:
    name = str(folder)
    if bad := sorted({c for c in name if c in UNREADABLE}):
        raise Mistake(
            f"--workdir {name!r}: checkpoints below a path with {' '.join(map(repr, bad))} cannot be read back; choose a name "
            "without these characters"
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise Mistake(f"--workdir {name!r}: the path is not valid UTF-8; choose another name") from None
    if places.is_remote(folder):
        if not name.startswith("gs://"):
            raise Mistake(
                f"--workdir {name}: checkpoints are written to local folders and gs:// only; choose one of these"
            )
        places.check_bucket(folder)  # the first write, before the first step, tells whether it may be written
        try:
            places.sizes(folder)
        except NotADirectoryError:
            raise Mistake(f"--workdir {name}: a file, not a folder; choose another folder") from None
        return
    path = Path(name)
    try:
        if path.is_symlink() and not path.exists():
            raise Mistake(f"--workdir {name}: links to {os.readlink(path)}, which is missing; choose another folder")
        there = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:
        raise Mistake(
            f"--workdir {name}: cannot be created ({error.strerror or error}); choose another folder"
        ) from None
    if not there.is_dir():
        raise Mistake(f"--workdir {name}: {there} is a file, not a folder; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Mistake(
            f"--workdir {name}: no permission to write in {there}; check its permissions, or choose another folder"
        )


def _check_same_run(old: Experiment, new: Experiment, folder: epath.Path) -> None:
    """Check that task and model are unchanged. Settings that only one of them has (another version) are left to the shapes."""
    fix = "choose another --workdir and set config.train.init_from to this folder to start from its parameters"
    if old.task != new.task:
        raise Mistake(
            f"{folder}: holds a run with config.task={old.task!r}, not {new.task!r}; use its settings, or {fix}"
        )
    before, after = leaves(_plain(old.model)), leaves(_plain(new.model))
    changed = [
        f"config.model.{key} {before[key]!r} -> {after[key]!r}"
        for key in sorted(before.keys() & after.keys())
        if before[key] != after[key] and key.split(".")[-1] not in FREE
    ]
    if changed:
        raise Mistake(f"{folder}: holds a run of another model ({', '.join(changed[:4])}); use its settings, or {fix}")


def _check_same_tokenizer(old: Experiment, new: Experiment, folder: epath.Path) -> None:
    kept, given = kept_tokenizer(folder, old), new.data.tokenizer
    if kept is None or not given:
        return
    fix = f"set config.data.tokenizer={kept}, or choose another --workdir"
    if not same_content(kept, checkpoint_files.folder_of(given)):
        raise Mistake(f"config.data.tokenizer {given}: differs from the tokenizer of the run in {folder}; {fix}")
    if given.endswith(".txt") and old.data.lower_case != new.data.lower_case:
        raise Mistake(
            f"config.data.lower_case: is {new.data.lower_case}, but the run in {folder} has {old.data.lower_case}; use its "
            "setting, or choose another --workdir"
        )


def _check_same_classes(old: Experiment, new: Experiment, folder: epath.Path) -> None:
    """Check that the class names are unchanged, ignoring differences in file encoding. None: the classes of Youku-mPLUG."""
    kept, given = folder / CLASSES, new.data.classes
    before = preprocess.names_in(str(kept), "the run's classes") if kept.exists() else None
    if before is None and old.data.classes:
        return  # the run has no copy to compare with
    if given and not checkpoint_files.folder_of(given).exists() and before is not None and given == old.data.classes:
        return  # the original file is gone; the run's copy replaces it
    after = preprocess.class_names(new.data) if given else None
    if before != after:
        youku = "config.data.classes= (the 45 classes of Youku-mPLUG)"
        source = f"config.data.classes={kept}" if before is not None else youku
        raise Mistake(
            f"config.data.classes {given!r}: differs from the class names of the run in {folder}; set {source}, or choose another "
            "--workdir"
        )


def check_init_from(experiment: Experiment) -> None:
    """Check that every folder of config.train.init_from has parameters, of a run with the same tokenizer.

    The tokenizer does not matter for subtrees of "vision". `config.train.other_tokenizer` turns the comparison off.

    Raises:
      Mistake: a folder has no checkpoint, another tokenizer, or a language model that computes something else.
    """
    given = experiment.data.tokenizer
    for subtree, _, name in checkpoint_files.sources(experiment.train.init_from):
        folder = checkpoint_files.folder_of(name)
        if not folder.exists():
            other = f" (and none named {subtree}={name})" if subtree else ""
            raise Mistake(
                f"config.train.init_from: {name}: no such folder{other}; give the --workdir of a run or the --out of a conversion"
            )
        if not checkpoint_files.places(name):
            raise Mistake(
                f"config.train.init_from: {name}: no checkpoint here; give the --workdir of a run or the --out of a conversion"
            )
        if subtree in ("", "llm"):
            _check_decoder(experiment, folder, name)
        if experiment.train.other_tokenizer or subtree.split("/")[0] == "vision" or not given:
            continue
        old = read_settings(folder) if (folder / CONFIG).exists() else None
        kept = kept_tokenizer(folder, old)
        fix = "or set config.train.other_tokenizer=True if the meaning of token ids may differ"
        if kept is not None and not same_content(kept, checkpoint_files.folder_of(given)):
            raise Mistake(
                f"config.train.init_from: {name} was trained with another tokenizer than {given}; set "
                f"config.data.tokenizer={kept}, {fix}"
            )
        if old and kept is not None and given.endswith(".txt") and old.data.lower_case != experiment.data.lower_case:
            raise Mistake(
                f"config.train.init_from: {name} was trained with config.data.lower_case={old.data.lower_case}; set the same "
                f"value, {fix}"
            )


def _check_decoder(experiment: Experiment, folder: epath.Path, given: str) -> None:
    """Check the settings of a folder's language model that no parameter shape reveals, such as the base of rotary positions.

    Raises:
      Mistake: such a setting differs.
    """
    after = _plain(experiment.model).get("llm")
    before = _decoder_in(folder)
    if not after or any(before.get(name) != after.get(name) for name in ("vocab", "width", "depth")):
        return  # the shapes will differ; a conversion without a language model stores placeholder sizes
    # Without adapters in the folder, the new run starts its own with any settings.
    unused = () if before.get("lora_rank") else ("lora_scale", "lora_targets")
    for setting in sorted(before.keys() & after.keys() - {*FREE, *unused, "max_positions"}):
        old, new = before[setting], after[setting]
        dropped = setting == "lora_rank" and old and not new  # the new run would ignore the adapters
        size = isinstance(old, int) and not isinstance(old, bool)
        if dropped or (old != new and not size):
            raise Mistake(
                f"config.train.init_from: {given}: its language model has {setting}={old!r}, but config.model.llm.{setting} is "
                f"{new!r}; set the same value, or choose another folder"
            )


def _decoder_in(folder: epath.Path) -> dict[str, Any]:
    """Return the language model settings of a run or a conversion; empty if the folder does not record them."""
    if (folder / CONFIG).exists():
        return dict(_plain(read_settings(folder).model).get("llm") or {})
    record = folder / "conversion.json"
    try:
        sizes = list(json.loads(record.read_text(encoding="utf-8"))["sizes"].values()) if record.exists() else []
        return dict(sizes[0].get("llm", sizes[0])) if len(sizes) == 1 else {}
    except (ValueError, KeyError, AttributeError):
        raise Mistake(f"{record}: damaged; run the conversion again") from None


def kept_tokenizer(workdir: str | epath.Path, experiment: Experiment | None = None) -> epath.Path | None:
    """Return the run's copy of its tokenizer, or None. Without the run's settings, take the only file in tokenizer/."""
    folder = checkpoint_files.folder_of(str(workdir)) / TOKENIZER
    if experiment and experiment.data.tokenizer:
        named = folder / epath.Path(experiment.data.tokenizer).name
        if named.exists():
            return named
    files = sorted(folder.iterdir()) if folder.exists() else []
    return files[0] if len(files) == 1 else None


def same_content(one: epath.Path, other: epath.Path) -> bool:
    """Return whether two files have the same content; True if one cannot be read, which its reader reports."""
    try:
        return environment.digest(one) == environment.digest(other)
    except OSError:
        return True


def write(experiment: Experiment, workdir: str | epath.Path) -> None:
    """Create the folder and write config.json, environment.json and the copies of the tokenizer and class names.

    Call it on one process, after `check` has passed. Settings that differ from those of the resumed run are logged.
    """
    folder = checkpoint_files.folder_of(str(workdir))
    folder.mkdir(parents=True, exist_ok=True)
    path, text = folder / CONFIG, config.to_json(experiment)
    old = None
    if path.exists():
        old = read_settings(folder)
        before, after = leaves(_plain(config.settings_of(old))), leaves(_plain(config.settings_of(experiment)))
        changed = [
            f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
            for key in sorted(before.keys() | after.keys())
            if before.get(key) != after.get(key)
        ]
        if changed:
            logging.warning("%s: settings differ from those stored in this folder: %s", folder, "; ".join(changed))
    # Copies of a start that was killed before it wrote config.json may be of other settings.
    keep = old is not None or checkpoint_files.latest_step(str(folder)) is not None
    # Write config.json last: its presence implies complete copies.
    if experiment.data.tokenizer:  # inference needs it even when the data are gone
        source = checkpoint_files.folder_of(experiment.data.tokenizer)
        (folder / TOKENIZER).mkdir(exist_ok=True)
        _copy(source, folder / TOKENIZER / source.name, keep)
    if experiment.data.classes:
        _copy(checkpoint_files.folder_of(experiment.data.classes), folder / CLASSES, keep)
    elif not keep:
        (folder / CLASSES).unlink(missing_ok=True)
    digests = environment.digests(folder) | (environment.stored(folder) if keep else {})
    write_whole(folder / ENVIRONMENT, (json.dumps(environment.facts(digests), indent=2) + "\n").encode())
    write_whole(path, text.encode())


def _copy(source: epath.Path, target: epath.Path, keep: bool) -> None:
    """Copy the file unless `target` exists and is to be kept: the first copy is the one the parameters were trained with."""
    if not (keep and target.exists()):
        write_whole(target, source.read_bytes())


def write_whole(path: epath.Path, content: bytes) -> None:
    """Write the file atomically."""
    if places.is_remote(path):
        places.write_bytes(path, content)
        return
    partial = path.with_name(f".{path.name}.partial")  # one name, so that kills leave one file at most
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _plain(tree: Any) -> Any:
    """Return the settings after a round trip through JSON, which turns tuples into lists."""
    return json.loads(json.dumps(config.settings_of(tree)))


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to {"data.frames": 4, ...}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        path: leaf
        for key, value in tree.items()
        for path, leaf in leaves(value, f"{prefix}.{key}" if prefix else key).items()
    }
