"""What can be found wrong before anything is compiled or initialised, and before the run's folder is made."""

import difflib
from pathlib import Path

import numpy as np
from etils import epath

from ymplug_jax.core import checkpoint_files
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import schema
from ymplug_jax.data.records import Split
from ymplug_jax.data.source import open_split
from ymplug_jax.tasks import options
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.training import run_folder, setup


def check(experiment: Experiment, workdir: epath.Path, mode: str) -> None:
    """Whether a run can begin, or an evaluation. Changes nothing on disk, allocates no parameter.

    Args:
      experiment: resolved settings.
      workdir: folder of the run.
      mode: "train" or "eval".

    Raises:
      Mistake, ValueError, FileNotFoundError: what is wrong, in one line that names the setting or file and the fix.
      OSError: a place that cannot be read.
    """
    run_folder.check(experiment, workdir)
    train, data = experiment.train, experiment.data
    begun = checkpoint_files.latest_step(str(workdir)) is not None
    if mode == "eval" and not (train.init_from or checkpoint_files.places(str(workdir))):
        raise Mistake(
            f"{workdir}: no checkpoint here; give the --workdir of a run, or config.train.init_from to score as it stands"
        )
    if not data.path:
        raise Mistake("config.data.path is empty; give the folder that data_prep.build_shards wrote")
    if not data.tokenizer:
        raise Mistake("config.data.tokenizer is empty; give a sentencepiece *.model, a tokenizer.json or a vocab.txt")
    if mode == "eval" and not data.eval_split:
        raise Mistake(
            "config.data.eval_split is empty; name the split to score, as --config.data.eval_split=validation"
        )
    if train.eval_scores_every and not data.eval_split:
        raise Mistake(
            "config.train.eval_scores_every: config.data.eval_split is empty; name the split to score, as "
            "--config.data.eval_split=validation"
        )
    if train.best and not train.eval_scores_every:
        raise Mistake(
            f'config.train.best is {train.best!r}, but config.train.eval_scores_every is empty; write how often, as "5 epochs"'
        )
    if not begun:
        run_folder.check_init_from(experiment)
    _check_files(experiment)
    splits = (data.train_split, data.eval_split) if mode == "train" else (data.eval_split,)
    records = {split: open_split(data.path, split) for split in splits if split}
    task = task_lib.get(experiment)
    if train.best:
        task.score_named(train.best)
    for split, found in records.items():
        _check_split(experiment, split, found, task.kinds)
    run = setup.prepare(experiment, training=mode == "train")  # traces the model: the slowest check
    if not begun:
        setup.init_from(run, values=False)


def _check_split(experiment: Experiment, split: str, records: Split, kinds: tuple[str, ...]) -> None:
    """Whether a split has what the task reads."""
    path = experiment.data.path
    if not len(records):
        raise Mistake(f"{path}: split {split!r} has no records; build it again, or name another split")
    if not records.kind:
        raise Mistake(
            f"{path}/{schema.MANIFEST} is missing or names no kind; copy it too, or build the shards again: without it "
            "nobody knows what the records hold"
        )
    if records.kind not in kinds:
        raise Mistake(
            f"{path}: split {split!r} is of kind {records.kind!r}, config.task={experiment.task!r} takes "
            f"{' or '.join(repr(kind) for kind in sorted(kinds))}; build shards of such a CSV (data_prep.build_shards "
            f"--config {sorted(set(kinds) - {'text'})[0]}), or take the config of another task"
        )


def _check_files(experiment: Experiment) -> None:
    """Files that the options name. Some are read after hours, when the scores are made."""
    for name, value, arrays in options.files(experiment):
        if "://" in value:
            continue
        where, file = f"config.options.{name} {value}", Path(value).expanduser()
        if not file.is_file():
            raise Mistake(f"{where}: {missing(file)}")
        if not arrays:
            continue
        try:
            with np.load(file, allow_pickle=False) as index:
                there = set(index.files)
        except Exception as error:  # numpy and zipfile raise many kinds on a file that is none of theirs
            raise Mistake(f"{where}: no .npz file ({error}); give the index.npz of an evaluation") from None
        if lost := [array for array in arrays if array not in there]:
            raise Mistake(f"{where}: no {lost[0]!r} in it; give the index.npz of an evaluation of the right task")


def missing(file: Path) -> str:
    """What to say about a file that is not there: a folder, or the nearest name beside it."""
    if file.is_dir():
        return "a folder, not a file; name the file in it"
    if not file.parent.is_dir():
        return f"no such file, and no folder {file.parent}"
    near = difflib.get_close_matches(file.name, [other.name for other in file.parent.iterdir()], 1)
    return f"no such file; did you mean {str(file.parent / near[0])!r}?" if near else "no such file"
