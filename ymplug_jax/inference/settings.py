"""The settings and files that a checkpoint is loaded with: those of a run's folder, or those given for a conversion.

Everything here is checked before a weight is read.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from etils import epath

from ymplug_jax.core import checkpoint_files, config, config_file
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import conversation
from ymplug_jax.tasks import names, options
from ymplug_jax.training import environment, introductions, run_folder


class Source(NamedTuple):
    """A folder with parameters, and what they are loaded with."""

    folder: epath.Path
    experiment: Experiment
    tokenizer: epath.Path | None  # None: the task uses none
    classes: epath.Path | None  # None: the 45 categories of Youku-mPLUG
    converted: bool = False  # from another program's checkpoint, not trained here
    whole_lines: bool = False  # chat: prompts are tokenised as the published weights' program does
    introduction: str = conversation.SYSTEM  # chat: text before the first turn, "" for none


def is_conversion(folder: epath.Path) -> bool:
    """Whether a folder holds converted parameters and no run."""
    return not (folder / run_folder.CONFIG).exists() and (folder / "checkpoints" / checkpoint_files.CONVERTED).exists()


def of_run(folder: epath.Path, needs: str = "") -> Source:
    """The settings of a run, its own copies of tokenizer and class names, and the introduction of its conversations.

    The copies count, because the files that the settings name may be gone or changed.

    Args:
      folder: the run's folder, local or gs://.
      needs: command of `ymplug_jax.predict` that the run's task must answer; "": any task.

    Raises:
      Mistake: the folder holds no run with a checkpoint, the settings are damaged, the task does not answer `needs`, or a copy is missing or has changed.
    """
    experiment = _stored_settings(folder)
    check_task(experiment.task, folder, needs)
    if checkpoint_files.latest_step(str(folder)) is None:
        raise Mistake(f"{folder}: this run has no checkpoint yet; train it until its first save")
    tokenizer = classes = None
    if experiment.data.tokenizer:
        tokenizer = folder / run_folder.TOKENIZER / epath.Path(experiment.data.tokenizer).name
        if not tokenizer.is_file():
            raise Mistake(
                f"{tokenizer}: the run's copy of its tokenizer is missing; copy the tokenizer that the run was trained with there"
            )
    elif needs == "chat":
        raise Mistake(f"{folder / run_folder.CONFIG}: damaged, config.data.tokenizer is empty; restore a copy")
    if (folder / run_folder.CLASSES).is_file():
        classes = folder / run_folder.CLASSES
    elif experiment.data.classes:
        raise Mistake(
            f"{folder / run_folder.CLASSES}: the run's class names are missing; copy the file that the run was trained with there"
        )
    environment.check(folder)
    return Source(folder, experiment, tokenizer, classes, introduction=introductions.read(folder))


def of_conversion(
    folder: epath.Path,
    given: str | Mapping[str, Any] | None,
    tokenizer: str,
    classes: str,
    needs: str = "",
) -> Source:
    """The settings that the caller gives for converted parameters.

    Args:
      folder: of the conversion.
      given: config file, as `--config` takes it, or the settings that its `get_config` returns; None for chat weights, whose
        conversion records all settings.
      tokenizer: file; "": the one that the settings name.
      classes: file of class names; "": the one that the settings name.
      needs: as in `of_run`.

    Raises:
      Mistake: settings or tokenizer are missing, a file does not exist, the task does not answer `needs`, or the language model of the
        settings computes something else than the converted one.
    """
    chat = _chat_record(folder) if given is None else None
    if given is None and chat is not None:
        return _of_chat(folder, chat, tokenizer, needs)
    if given is None:
        raise Mistake(
            f"{folder}: a converted checkpoint has no config.json and no tokenizer; fine-tune it with --config.train.init_from and use "
            "that run, or load it in Python with ymplug_jax.load(folder, config=..., tokenizer=...)"
        )
    made = config_file.load(given) if isinstance(given, str) else given
    experiment = options.completed(config.from_config_dict(made))
    check_task(experiment.task, folder, needs)
    own = tokenizer or experiment.data.tokenizer
    if not own:
        raise Mistake(
            f"{folder}: a converted checkpoint has no tokenizer; give tokenizer=FILE, that of the source model"
        )
    listed = classes or experiment.data.classes
    for name, file in (("tokenizer", own), ("classes", listed)):
        if file and not checkpoint_files.folder_of(file).is_file():
            raise Mistake(f"{name}={file}: no such file; give the {name} file of the source model")
    data = dataclasses.replace(experiment.data, tokenizer=own, classes=listed)
    train = dataclasses.replace(experiment.train, init_from=str(folder))
    experiment = dataclasses.replace(experiment, data=data, train=train)
    run_folder.check_init_from(experiment)  # settings that no shape shows, such as the base of rotary positions
    listed_file = checkpoint_files.folder_of(listed) if listed else None
    return Source(folder, experiment, checkpoint_files.folder_of(own), listed_file, converted=True)


def in_int8(source: Source) -> Source:
    """The source with its frozen matrices in eight bits."""
    train = dataclasses.replace(source.experiment.train, frozen_dtype="int8")
    return source._replace(experiment=dataclasses.replace(source.experiment, train=train))


def _chat_record(folder: epath.Path) -> dict[str, Any] | None:
    """conversion.json of a conversion that can hold conversations as it is; None of any other.

    Raises:
      Mistake: the file is damaged.
    """
    record = folder / "conversion.json"
    try:
        facts = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        return facts if facts.get("chat") else None
    except (ValueError, AttributeError):
        raise Mistake(f"{record}: damaged; run the conversion again") from None


def _of_chat(folder: epath.Path, record: Mapping[str, Any], tokenizer: str, needs: str) -> Source:
    """The settings of converted chat weights.

    Args:
      folder: of the conversion.
      record: conversion.json.
      tokenizer: file; "": the copy that the conversion made.
      needs: as in `of_run`.

    Raises:
      Mistake: there is no tokenizer, or the task does not answer `needs`.
    """
    (task,) = names.answering("chat")
    check_task(task, folder, needs)
    own = checkpoint_files.folder_of(tokenizer) if tokenizer else run_folder.kept_tokenizer(folder)
    if own is None:
        raise Mistake(
            f"{folder}: the conversion has no tokenizer; give tokenizer=FILE, the tokenizer.json of the source model"
        )
    if not own.is_file():
        raise Mistake(f"tokenizer={own}: no such file; give the tokenizer file of the source model")
    (model,), chat = record["sizes"].values(), record["chat"]
    # Half precision where there is an accelerator; CPUs compute it slowly.
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = {part: {**fields, "dtype": dtype} for part, fields in model.items()}
    data = config.Data(
        frames=chat["frames"], image_size=model["vision"]["image_size"], max_tokens=chat["max_tokens"], augment=False,
        tokenizer=str(own),
    )  # fmt: skip
    train = config.Train(init_from=str(folder))
    optim = config.Optim(warmup="0 steps")  # of a run that is never trained
    experiment = options.completed(Experiment(task=task, model=model, data=data, optim=optim, train=train))
    return Source(folder, experiment, own, None, converted=True, whole_lines=chat["whole_lines"])


def check_task(task: str, folder: epath.Path, needs: str) -> None:
    """Whether runs of a task answer a command of `ymplug_jax.predict`.

    Raises:
      Mistake: they do not; the message names the tasks that do.
    """
    if needs and task not in (able := names.answering(needs)):
        listed = " or ".join(filter(None, (", ".join(able[:-1]), able[-1])))
        raise Mistake(f"{folder} is a run of task {task!r}; {needs} needs a run of task {listed}")


def _stored_settings(folder: epath.Path) -> Experiment:
    """The settings in a run's folder.

    Raises:
      Mistake: the folder is not that of a run (the message says what it is), or its settings cannot be read.
    """
    asked = "give the --workdir of a run"
    try:
        there = (folder / run_folder.CONFIG).exists()
    except OSError as error:
        raise Mistake(f"{folder}: cannot be read ({error.strerror or error}); check its permissions") from None
    if there:
        return run_folder.read_settings(folder)
    if not folder.exists():
        raise Mistake(f"{folder}: no such folder; {asked}")
    if not folder.is_dir():
        raise Mistake(f"{folder}: a file, not a folder; {asked}")
    if seeds := sorted(part.name for part in folder.iterdir() if (part / run_folder.CONFIG).exists()):
        raise Mistake(f"{folder}: no config.json here, but runs {', '.join(seeds)}; give one of them")
    above = next((place for place in folder.parents if (place / run_folder.CONFIG).exists()), None)
    raise Mistake(f"{folder}: no config.json here; {asked}" + (f", such as {above}" if above else ""))
