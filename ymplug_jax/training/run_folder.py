"""What a run's folder holds beside checkpoints: config.json, environment.json, tokenizer/ and classes.txt.

A run's own copies of the tokenizer and the class names never change: ids and label indices mean something only with them. So the
checks here come first and write nothing; `write` follows when the run was accepted.
"""

import hashlib
import json
import logging
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ymplug_jax.core import checkpoint_files, config
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.tasks import options
from ymplug_jax.tasks.common import preprocess

CONFIG = "config.json"
CLASSES = "classes.txt"
ENVIRONMENT = "environment.json"
TOKENIZER = "tokenizer"
# Orbax finds the parts of a save with a glob below the whole path, so that these are read as patterns or escapes.
UNREADABLE = "[*?\\\0"
# Settings of a model that change how it is computed or regularized, not what its parameters mean.
FREE = ("remat", "dropout", "dtype")


def read_settings(workdir: str | epath.Path) -> Experiment:
    """The settings that a run was started with.

    Raises:
      Mistake: there is no config.json, or it is damaged.
    """
    path = checkpoint_files.folder_of(str(workdir)) / CONFIG
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Mistake(f"{path.parent}: no {CONFIG} here; give the --workdir of a run") from None
    except OSError as error:
        raise Mistake(f"{path}: cannot be read ({error.strerror or error}); mend the file's permissions") from None
    fix = "put back a copy, or delete it and name --config and all settings again"
    try:
        plain = json.loads(text.decode("utf-8-sig"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are two of these
        where = "it ends too early" if not text.strip() else str(error)
        raise Mistake(f"{path}: damaged, not JSON ({where}); {fix}") from None
    try:
        experiment = options.completed(config.from_config_dict(plain), stored=True)
    except (ValueError, TypeError, AttributeError) as error:
        what = error if isinstance(error, ValueError) else f"these are not the settings of a run ({error})"
        raise Mistake(f"{path}: damaged, or of another version: {what}; {fix}") from None
    if not isinstance(experiment.model, dict):
        raise Mistake(f"{path}: damaged, config.model is {experiment.model!r}, not a group of settings; {fix}")
    return experiment


def check(experiment: Experiment, workdir: str | epath.Path) -> None:
    """Whether a run with these settings can begin or go on in this folder. Changes nothing on disk.

    Raises:
      Mistake: the folder cannot be made, written or read back, or it holds a run of another task, model, tokenizer or other classes.
    """
    folder = checkpoint_files.whole(str(workdir))
    _check_place(folder)
    if (folder / CONFIG).exists():
        old = read_settings(folder)
        _check_same_run(old, experiment, folder)
        _check_same_tokenizer(old, experiment, folder)
        _check_same_classes(old, experiment, folder)
    elif experiment.data.classes:
        preprocess.class_names(experiment.data)


def check_no_conversion(workdir: str | epath.Path) -> None:
    """Whether a run can be trained in this folder, as far as a conversion in it goes.

    Raises:
      Mistake: there is one, whose parameters would stand beside those of the run.
    """
    if (checkpoint_files.whole(str(workdir)) / "checkpoints" / checkpoint_files.CONVERTED).exists():
        raise Mistake(
            f"--workdir {workdir}: holds a conversion, whose parameters would stand beside those of the run; choose another folder, "
            f"and start from this one with --config.train.init_from={workdir}"
        )


def _check_place(folder: epath.Path) -> None:
    name = str(folder)
    if bad := sorted({c for c in name if c in UNREADABLE}):
        raise Mistake(
            f"--workdir {name!r}: checkpoints in a path with {' '.join(map(repr, bad))} can be written but never read back; "
            "choose a name without it"
        )
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise Mistake(f"--workdir {name!r}: a path that is not UTF-8; choose another name") from None
    if "://" in name:
        return  # a bucket has no folders; the first write tells
    path = Path(name)
    try:
        if path.is_symlink() and not path.exists():
            raise Mistake(f"--workdir {name}: a link to {os.readlink(path)}, which is not there; choose another folder")
        there = next(place for place in (path, *path.parents) if place.exists())
    except OSError as error:
        raise Mistake(f"--workdir {name}: cannot be made ({error.strerror or error}); choose another folder") from None
    if not there.is_dir():
        raise Mistake(f"--workdir {name}: {there} is a file, not a folder; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise Mistake(
            f"--workdir {name}: no permission to write in {there}; choose another folder or change its permissions"
        )


def _check_same_run(old: Experiment, new: Experiment, folder: epath.Path) -> None:
    """Task and model; a setting that only one of them has came with another version and is left to the shapes."""
    fix = "choose another --workdir, and name this one in config.train.init_from to start from its parameters"
    if old.task != new.task:
        raise Mistake(
            f"{folder} holds a run with config.task={old.task!r}, not {new.task!r}; use its settings, or {fix}"
        )
    before, after = leaves(_plain(old.model)), leaves(_plain(new.model))
    changed = [
        f"config.model.{key} {before[key]!r} -> {after[key]!r}"
        for key in sorted(before.keys() & after.keys())
        if before[key] != after[key] and key.split(".")[-1] not in FREE
    ]
    if changed:
        raise Mistake(f"{folder} holds a run of another model: {'; '.join(changed[:4])}; use its settings, or {fix}")


def _check_same_tokenizer(old: Experiment, new: Experiment, folder: epath.Path) -> None:
    kept, given = kept_tokenizer(folder, old), new.data.tokenizer
    if kept is None or not given:
        return
    fix = f"set config.data.tokenizer={kept}, or choose another --workdir"
    if not same_content(kept, checkpoint_files.folder_of(given)):
        raise Mistake(f"config.data.tokenizer {given}: not the tokenizer of the run in {folder}, by content; {fix}")
    if given.endswith(".txt") and old.data.lower_case != new.data.lower_case:
        raise Mistake(
            f"config.data.lower_case is {new.data.lower_case}, but the run in {folder} has {old.data.lower_case}; "
            "use its setting, or choose another --workdir"
        )


def _check_same_classes(old: Experiment, new: Experiment, folder: epath.Path) -> None:
    """The names that count, not the bytes of the files. None: the classes of Youku-mPLUG."""
    kept, given = folder / CLASSES, new.data.classes
    before = preprocess.names_in(str(kept), "the run's classes") if kept.exists() else None
    if before is None and old.data.classes:
        return  # a run without its copy
    if given and not checkpoint_files.folder_of(given).exists() and before is not None and given == old.data.classes:
        return  # the file is gone, the run's copy is there
    after = preprocess.class_names(new.data) if given else None
    if before != after:
        source = (
            f"config.data.classes={kept}" if before is not None else "config.data.classes to nothing (its 45 classes)"
        )
        raise Mistake(
            f"config.data.classes {given!r}: not the class names of the run in {folder}; set {source}, or choose another --workdir"
        )


def check_init_from(experiment: Experiment) -> None:
    """Whether every folder of config.train.init_from has parameters, of a run with this tokenizer.

    Parts below "vision" know no words; what else is taken is compared, unless config.train.other_tokenizer is set.

    Raises:
      Mistake: a folder that is missing or holds no checkpoint, or whose run has another tokenizer or a language model that
        computes something else from the same parameters.
    """
    given = experiment.data.tokenizer
    for subtree, _, name in checkpoint_files.sources(experiment.train.init_from):
        folder = checkpoint_files.folder_of(name)
        if not folder.exists():
            other = f" (nor one named {subtree}={name})" if subtree else ""
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
        fix = "or set config.train.other_tokenizer=True if its ids need not mean the same"
        if kept is not None and not same_content(kept, checkpoint_files.folder_of(given)):
            raise Mistake(
                f"config.train.init_from: {name} was trained with another tokenizer than {given}, by content; set "
                f"config.data.tokenizer={kept}, {fix}"
            )
        if old and kept is not None and given.endswith(".txt") and old.data.lower_case != experiment.data.lower_case:
            raise Mistake(
                f"config.train.init_from: {name} was trained with config.data.lower_case={old.data.lower_case}; set it so, {fix}"
            )


def _check_decoder(experiment: Experiment, folder: epath.Path, given: str) -> None:
    """Whether the language model of a folder is that of the settings in what no shape tells, such as the base of rotary positions.

    Raises:
      Mistake: it is another one.
    """
    after = config.settings_of(experiment.model).get("llm")
    before = _decoder_in(folder)
    if not after or any(before.get(name) != after.get(name) for name in ("vocab", "width", "depth")):
        return  # the shapes say so, and a conversion without a language model has a stand-in
    for setting in sorted(before.keys() & after.keys() - {*FREE, "max_positions"}):
        old, new = before[setting], after[setting]
        dropped = setting == "lora_rank" and old and not new  # adapters that the run would leave out
        size = isinstance(old, int) and not isinstance(old, bool)
        if dropped or (old != new and not size):
            raise Mistake(
                f"config.train.init_from: {given}: its language model has {setting} {old!r}, config.model.llm.{setting} is "
                f"{new!r}; set it so, or give another folder"
            )


def _decoder_in(folder: epath.Path) -> dict[str, Any]:
    """Settings of the language model of a run or a conversion; empty where nothing says them."""
    if (folder / CONFIG).exists():
        return dict(config.settings_of(read_settings(folder).model).get("llm") or {})
    record = folder / "conversion.json"
    try:
        sizes = list(json.loads(record.read_text(encoding="utf-8"))["sizes"].values()) if record.exists() else []
        return dict(sizes[0].get("llm", sizes[0])) if len(sizes) == 1 else {}
    except (ValueError, KeyError, AttributeError):
        raise Mistake(f"{record}: damaged; convert again") from None


def kept_tokenizer(workdir: str | epath.Path, experiment: Experiment | None = None) -> epath.Path | None:
    """The run's own copy of its tokenizer, None if it has none. `experiment` holds the settings of the run, if they are known."""
    folder = checkpoint_files.folder_of(str(workdir)) / TOKENIZER
    if experiment and experiment.data.tokenizer:
        named = folder / epath.Path(experiment.data.tokenizer).name
        if named.exists():
            return named
    files = sorted(folder.iterdir()) if folder.exists() else []
    return files[0] if len(files) == 1 else None


def same_content(one: epath.Path, other: epath.Path) -> bool:
    """Whether two files hash alike; True where `other` is not there, which whoever reads it says better."""
    try:
        return digest(one) == digest(other)
    except OSError:
        return True


def digest(path: epath.Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(experiment: Experiment, workdir: str | epath.Path) -> None:
    """Make the folder and write config.json, environment.json and the copies of tokenizer and class names.

    Call it on one host, for a run that `check` let pass. A changed setting of a resumed run is named in a warning.
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
            logging.warning("this folder was written with other settings: %s", "; ".join(changed))
    # The copies first: where config.json is, they are whole.
    if experiment.data.tokenizer:  # a run answers questions long after its data is gone
        source = checkpoint_files.folder_of(experiment.data.tokenizer)
        (folder / TOKENIZER).mkdir(exist_ok=True)
        _copy(source, folder / TOKENIZER / source.name)
    if experiment.data.classes:
        _copy(checkpoint_files.folder_of(experiment.data.classes), folder / CLASSES)
    _write_whole(folder / ENVIRONMENT, (json.dumps(_facts(), indent=2) + "\n").encode())
    _write_whole(path, text.encode())


def _copy(source: epath.Path, target: epath.Path) -> None:
    """A copy is made once: what the run began with stays."""
    if not target.exists():
        _write_whole(target, source.read_bytes())


def _write_whole(path: epath.Path, content: bytes) -> None:
    """The old content or the new, never a part of it. An object of a bucket is written as a whole by itself."""
    if "://" in str(path):
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _facts() -> dict[str, Any]:
    """What this process runs on."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ymplug_jax")
    return {
        "command": sys.argv,
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "processes": jax.process_count(),
        "versions": {name: metadata.version(name) for name in names},
    }


def _plain(tree: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(config.settings_of(tree)))


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"data.frames": 4, ...} of nested dicts."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        path: leaf
        for key, value in tree.items()
        for path, leaf in leaves(value, f"{prefix}.{key}" if prefix else key).items()
    }
