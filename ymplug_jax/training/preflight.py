"""Check settings, files and data before anything is compiled or initialised and before the run folder is created."""

import difflib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from etils import epath

from ymplug_jax.core import checkpoint_files, place_copies, places
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import measuring, schema
from ymplug_jax.data.records import CorruptRecord, Record, Split
from ymplug_jax.data.source import open_split, parts_of
from ymplug_jax.data.text import load_tokenizer
from ymplug_jax.tasks import options
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.training import mixing, run_folder, setup, vision_settings

READ = 64  # first records of a split whose texts are measured, to say how many are cut
TRIED = 8  # records of the evaluation split that `Task.scorable` sees; a setting that does not fit the split fails at the first


def check(experiment: Experiment, workdir: epath.Path, mode: str) -> None:
    """Check that training or evaluation can start. Changes nothing on disk and allocates no parameter.

    Args:
      experiment: resolved settings.
      workdir: folder of the run.
      mode: "train" or "eval".

    Raises:
      Mistake, ValueError, FileNotFoundError: a check failed; the message is one line with the setting or file and the fix.
      OSError: a file or folder cannot be read.
    """
    run_folder.check(experiment, workdir)
    if mode == "train":
        run_folder.check_no_conversion(workdir)
    train, data = experiment.train, experiment.data
    begun = checkpoint_files.latest_step(str(workdir)) is not None
    if mode == "eval" and not (train.init_from or checkpoint_files.places(str(workdir))):
        raise Mistake(
            f"{workdir}: no checkpoint here; give the --workdir of a trained run, or set config.train.init_from to score other "
            "parameters without training"
        )
    _check_named(experiment, mode)
    if train.eval_scores_every and not data.eval_split:
        raise Mistake(
            "config.train.eval_scores_every: needs a split, but config.data.eval_split is empty; name the split to score, e.g. "
            "--config.data.eval_split=validation"
        )
    if train.best and not train.eval_scores_every:
        raise Mistake(
            f"config.train.best: {train.best!r} is never computed, because config.train.eval_scores_every is empty; set it, e.g. "
            '--config.train.eval_scores_every="5 epochs"'
        )
    if not begun:
        run_folder.check_init_from(experiment)
        _check_words(experiment)
        vision_settings.check(experiment)
    _check_files(experiment)
    splits = (data.train_split, data.eval_split) if mode == "train" else (data.eval_split,)
    records = {split: open_split(data.path, split) for split in splits if split}
    task = task_lib.get(experiment)
    if train.best:
        task.score_named(train.best)
    for split, found in records.items():
        _check_split(experiment, split, found, task.kinds)
        _say_cut(task, split, found, data.skip_corrupt)
    if data.eval_split and task.scorable:
        _check_scorable(task.scorable, records[data.eval_split], data.skip_corrupt)
    # Measures the records and traces the model; the slowest checks come last.
    run = setup.prepare(experiment, training=mode == "train", workdir=workdir)
    if not begun:
        setup.init_from(run, values=False)
    elif mode == "train":
        mixing.check(run.mixture, workdir, checkpoint_files.examples_seen(str(workdir)))
    if data.eval_split:
        _check_evaluated(experiment, task, records[data.eval_split], train.eval_examples if mode == "train" else 0)


def _check_scorable(scorable: Callable[[Record], None], records: Split, skip_corrupt: bool) -> None:
    """Check the first records that are evaluated; the others are checked when they are scored."""
    for record in _first(records, TRIED, skip_corrupt):
        scorable(record)


def _first(records: Split, count: int, skip_corrupt: bool) -> Iterator[Record]:
    """Yield the first `count` records."""
    for i in range(min(count, len(records))):
        try:
            yield records[i]
        except CorruptRecord:
            if not skip_corrupt:
                raise


def _check_words(experiment: Experiment) -> None:
    """`check_words` for the folders of config.train.init_from."""
    if experiment.train.other_tokenizer:
        return
    for subtree, stored_as, name in checkpoint_files.sources(experiment.train.init_from):
        if subtree.split("/")[0] != "vision":
            check_words(experiment, name, stored_as)


def check_words(experiment: Experiment, name: str, below: str = "") -> None:
    """Check that a BERT vocabulary has as many words as the tables of a conversion, which holds no tokenizer to compare with.

    Args:
      experiment: settings; a tokenizer that is no vocab.txt is not compared, because tables of other models have spare rows.
      name: a conversion. Nothing is compared with a run.
      below: path of the parameters in it that are used.

    Raises:
      Mistake: the vocabulary has more or fewer words; it is that of another language, for example.
    """
    from ymplug_jax.core.verified_read import stored_in

    data = experiment.data
    if not data.tokenizer.endswith(".txt") or (checkpoint_files.folder_of(name) / run_folder.CONFIG).exists():
        return
    words = load_tokenizer(data.tokenizer, lower_case=data.lower_case).vocab_size
    stored = {path: leaf for place in checkpoint_files.places(name) for path, leaf in stored_in(place).items()}
    for path, leaf in stored.items():
        if path.startswith(below) and path.endswith("token_embed") and leaf.shape[0] != words:
            raise Mistake(
                f"config.data.tokenizer: {data.tokenizer} has {words} words, but {path} of {name} has {leaf.shape[0]}; give the vocab.txt "
                "of the source model, or set config.train.other_tokenizer=True if the meaning of token ids may differ"
            )


def _say_cut(task: task_lib.Task, split: str, records: Split, skip_corrupt: bool) -> None:
    """Say how many of the first records have texts of which the model reads a part only."""
    if task.lengths is None:
        return
    found = [task.lengths(record) for record in _first(records, READ, skip_corrupt)]
    if cut := [whole - read for whole, read in found if read < whole]:
        logging.warning(
            "split %r: texts of %d of the first %d records are cut, by up to %d tokens; config.data.max_tokens, config.data.max_words and the "
            "task's options say where",
            split, len(cut), len(found), max(cut),
        )  # fmt: skip


def _check_evaluated(experiment: Experiment, task: task_lib.Task, records: Split, examples: int) -> None:
    """Check that every record to evaluate fits into an example. Training checks its own records when it plans their packing."""
    if task.measure is None or task.room is None:
        return
    data = experiment.data
    sizes = measuring.measure(
        records, task.measure, threads=data.threads, skip_corrupt=data.skip_corrupt, count=examples
    )
    measuring.check_room(sizes, task.room, records)


def _check_named(experiment: Experiment, mode: str) -> None:
    """Check that the data, the tokenizer and the split to score are named."""
    data = experiment.data
    if not data.path:
        raise Mistake("config.data.path: empty; give the folder that data_prep.build_shards wrote")
    if not data.tokenizer:
        raise Mistake("config.data.tokenizer: empty; give a sentencepiece *.model, a tokenizer.json or a vocab.txt")
    if mode == "eval" and not data.eval_split:
        raise Mistake(
            "config.data.eval_split: empty; name the split to score, e.g. --config.data.eval_split=validation"
        )


def _check_split(experiment: Experiment, split: str, records: Split, kinds: tuple[str, ...]) -> None:
    """Check that a split has records of a kind that the task can read, in every folder."""
    for part in parts_of(records):
        _check_part(experiment, split, part, kinds)


def _check_part(experiment: Experiment, split: str, records: Split, kinds: tuple[str, ...]) -> None:
    path = records.path
    if not len(records):
        raise Mistake(f"{path}: split {split!r} has no records; build it again or choose another split")
    if not records.kind:
        raise Mistake(
            f"{path}/{schema.MANIFEST}: missing or without a kind, so the content of the records is unknown; copy the manifest "
            "along with the shards, or build them again"
        )
    if records.kind not in kinds:
        raise Mistake(
            f"{path}: split {split!r} has kind {records.kind!r}, but config.task={experiment.task!r} needs "
            f"{' or '.join(repr(kind) for kind in sorted(kinds))}; build shards of that kind (data_prep.build_shards "
            f"--config {sorted(set(kinds) - {'text'})[0]}), or use the config of another task"
        )


def _check_files(experiment: Experiment) -> None:
    """Check the files named by task options: some are read only when scores are computed, hours into a run."""
    for name, value, arrays in options.files(experiment):
        where, place = f"config.options.{name} {value}", places.place(value, f"config.options.{name}")
        if places.is_remote(place):
            if place.is_dir() or not place.exists():
                raise Mistake(f"{where}: no such file; correct the path")
        elif not place.is_file():
            raise Mistake(f"{where}: {missing(Path(place))}")
        if not arrays:
            continue
        try:
            with place_copies.local_copy(place) as file, np.load(file, allow_pickle=False) as index:
                there = set(index.files)
        except Exception as error:  # numpy and zipfile raise many types for other file formats
            raise Mistake(f"{where}: not an .npz file ({error}); give the index.npz of an evaluation") from None
        if lost := [array for array in arrays if array not in there]:
            raise Mistake(f"{where}: has no array {lost[0]!r}; give the index.npz of an evaluation of the right task")


def missing(file: Path) -> str:
    """Return the rest of a message about a missing file: it is a folder, or the closest name in its folder."""
    if file.is_dir():
        return "a folder, not a file; give a file in it"
    if not file.parent.is_dir():
        return f"no such file, and no folder {file.parent}; correct the path"
    near = difflib.get_close_matches(file.name, [other.name for other in file.parent.iterdir()], 1)
    return f"no such file; did you mean {str(file.parent / near[0])!r}?" if near else "no such file; correct the path"
