"""Parse the command line of `ymplug_jax.main`: flags, and settings from a config file or from an existing run.

Settings are written as `--config.train.batch_size=8`. They override the values of the file that `--config` names or, without
`--config`, the settings stored in `--workdir`. Every user error raises a one-line `Mistake`; only `--help` prints and exits.
"""

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from absl import flags as flags_lib
from etils import epath
from ml_collections import ConfigDict, config_flags

from ymplug_jax.core import config, config_file
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake

MODES = ("train", "eval", "plan", "compile", "bench")
SETTING = re.compile(r"--?(?:no)?config\.")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise a `Mistake`, so that argparse errors end like all other user errors."""
        flag, _, what = message.partition(": ")
        flag = flag.removeprefix("argument ")
        raise Mistake(f"{flag}: {what}" if what else message)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; give an integer such as 8") from None


def _mode(text: str) -> str:
    if text in MODES:
        return text
    raise argparse.ArgumentTypeError(f"unknown mode {text!r}; {near(text, MODES)}")


def near(name: str, known: Iterable[str]) -> str:
    """Return a hint for a misspelt name: the closest known name, or the list of all known names."""
    known = list(known)
    found = difflib.get_close_matches(name, known, 1)
    return f"did you mean {found[0]}?" if found else f"choose one of {', '.join(known)}"


def parser(doc: str) -> argparse.ArgumentParser:
    """Build the parser of all flags; settings (`--config.NAME=VALUE`) are handled by `overridden`."""
    made = _Parser(
        prog="python -m ymplug_jax.main", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="Settings are overridden as --config.data.path=DIR; ymplug_jax/core/config.py lists all of them.",
    )  # fmt: skip
    add = made.add_argument
    add(
        "--config",
        metavar="FILE.py[:SIZE]",
        help="config file, e.g. configs/mplug_video/pretrain.py:1.3b; without it, the settings stored in --workdir are used",
    )
    add(
        "--workdir",
        metavar="DIR",
        help="run folder (local path or gs://BUCKET/PATH) for checkpoints, metrics and settings",
    )
    add(
        "--mode", type=_mode, default="train", metavar="|".join(MODES),
        help="train: start or resume a run; eval: score its newest checkpoint; plan: print the parameter table and the memory "
        "of a step; compile: compile the step ahead of time for a TPU slice; bench: time the step (default: train)",
    )  # fmt: skip
    add(
        "--topology", default="v5e:4x4", metavar="TYPE:SHAPE",
        help="compile: topology of the TPU slice, e.g. v5e:4x8, v5p:4x4x4, v6e:8x8 (default: v5e:4x4)",
    )  # fmt: skip
    add(
        "--program", choices=("train", "predict"), default="train",
        help="compile: the training step, or the predictions of an evaluation, such as generated answers (default: train)",
    )  # fmt: skip
    add(
        "--slices", type=_whole, default=1, metavar="N",
        help="compile: number of slices; the data axis of the mesh spans them over the data-centre network (default: 1)",
    )  # fmt: skip
    add(
        "--steps", type=_whole, default=30, metavar="N",
        help="bench: number of timed steps, at least 2 (default: 30). Up to 3 warm-up steps run before them, never more than "
        "--steps. With --workdir, 3 further steps are profiled",
    )  # fmt: skip
    add(
        "--examples", type=_whole, default=0, metavar="N",
        help="eval: maximum number of examples; 0 scores the whole split (default: 0)",
    )  # fmt: skip
    add(
        "--seeds", type=_whole, default=1, metavar="N",
        help="train, eval: number of runs, with seeds config.train.seed, config.train.seed + 1, ...; each run uses the folder "
        "WORKDIR/seed_N, and eval reports the mean and standard deviation of every score (default: 1)",
    )  # fmt: skip
    add("--coordinator", metavar="HOST:PORT", help="address of process 0; TPU slices and SLURM jobs do not need it")
    add("--processes", type=_whole, metavar="N", help="number of processes of the run; requires --coordinator")
    add("--process_id", type=_whole, metavar="I", help="index of this process, from 0; requires --coordinator")
    add(
        "--start_timeout", type=_whole, default=300, metavar="SECONDS",
        help="multi-process runs: time limit for all processes to join (default: 300)",
    )  # fmt: skip
    add(
        "--heartbeat", type=_whole, default=100, metavar="SECONDS",
        help="multi-process runs: time without a message after which a process counts as lost (default: 100)",
    )  # fmt: skip
    return made


def parse(argv: Sequence[str], doc: str = "") -> tuple[argparse.Namespace, list[str]]:
    """Split the arguments into (parsed flags, settings in their original spelling).

    Args:
      argv: arguments without the program's name.
      doc: description of the program for `--help`.

    Raises:
      Mistake: a flag is unknown or its value has the wrong type.
    """
    settings: list[str] = []
    others: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not SETTING.match(argument):
            others.append(re.sub(r"^-(?=\w\w)", "--", argument))  # accept -mode=eval
            continue
        settings.append(argument)
        # Keep a following value with its setting; `overridden` knows the setting's type and rejects a stray one.
        if "=" not in argument and rest and not re.match(r"--?[A-Za-z]", rest[0]):
            settings.append(rest.pop(0))
    made = parser(doc)
    flags, unknown = made.parse_known_args(others)
    for argument in unknown:
        if not argument.startswith("-"):
            raise Mistake(f"{argument!r}: unexpected argument; write settings as --config.train.batch_size=8")
        name = argument.split("=")[0]
        known = [option for action in made._actions for option in action.option_strings if option.startswith("--")]
        raise Mistake(f"{name}: unknown flag; {near(name, known)}")
    return flags, settings


def experiment_of(flags: argparse.Namespace, settings: list[str]) -> Experiment:
    """Return the settings of `--config`, or of the run in `--workdir`, with the command line's overrides applied.

    Args:
      flags: first value of `parse`.
      settings: second value of `parse`.

    Raises:
      Mistake: there is neither a config file nor a run, or a setting is unknown or has the wrong type.
    """
    if flags.config is not None:
        made = config_file.load(flags.config)
    elif flags.workdir:
        made = config.to_config_dict(_of_run(flags.workdir, flags.seeds))
    else:
        raise Mistake(
            "--config: missing; give a config file, e.g. --config configs/tiny/pretrain.py, or the folder of an existing run with "
            "--workdir"
        )
    from ymplug_jax.tasks import options

    task = _task_given(settings)
    if task is not None and task != made.get("task"):
        with made.unlocked():  # the file's options belong to its own task
            made.task, made.options = task, ConfigDict()
    experiment = config.from_config_dict(overridden(options.complete(made), settings))
    return options.completed(experiment)


def _task_given(settings: Sequence[str]) -> str | None:
    """Return the value of config.task on the command line, or None."""
    for i, part in enumerate(settings):
        name, equals, value = part.partition("=")
        if re.fullmatch(r"--?config\.task", name):
            return value if equals else next(iter(settings[i + 1 :]), "")
    return None


def _of_run(name: str, seeds: int) -> Experiment:
    """Return the stored settings of the run in folder `name`; with several seeds, those of the run with the lowest seed.

    A tokenizer file that no longer exists is replaced by the run's own copy, which has the same content.
    """
    from ymplug_jax.core import checkpoint_files
    from ymplug_jax.data.source import folders_of
    from ymplug_jax.tasks import options
    from ymplug_jax.training import run_folder

    folder = checkpoint_files.folder_of(name, "--workdir")
    if seeds > 1 and not (folder / run_folder.CONFIG).exists():
        found = [place for place in folder.glob("seed_*") if place.name.removeprefix("seed_").isdecimal()]
        folder = min(found, key=lambda place: int(place.name.removeprefix("seed_")), default=folder)
    if not (folder / run_folder.CONFIG).exists():
        raise Mistake(
            f"--config: missing, and --workdir {name} holds no run (no {run_folder.CONFIG}); give a config file, e.g. "
            "--config configs/tiny/pretrain.py, or the folder of an existing run"
        )
    experiment = run_folder.read_settings(folder)
    data = experiment.data
    if data.tokenizer and not checkpoint_files.folder_of(data.tokenizer).exists():
        kept = run_folder.kept_tokenizer(folder, experiment)
        data = dataclasses.replace(data, tokenizer=str(kept) if kept else data.tokenizer)
    path = ",".join(_from_there(folder, name) for name in folders_of(data.path))
    data = dataclasses.replace(data, path=path)
    files = {file.name: _from_there(folder, file.value) for file in options.files(experiment)}
    return options.with_values(dataclasses.replace(experiment, data=data), files)


def _from_there(folder: epath.Path, name: str) -> str:
    """Resolve a relative path that does not exist here against the folder in which the run in `folder` was started."""
    from ymplug_jax.core import checkpoint_files
    from ymplug_jax.training import run_folder

    if not name or "://" in name or checkpoint_files.folder_of(name).exists():
        return name
    try:
        started = json.loads((folder / run_folder.ENVIRONMENT).read_text(encoding="utf-8"))["folder"]
        there = epath.Path(started) / name
    except (OSError, ValueError, KeyError, TypeError):  # written by an older version, or damaged
        return name
    return str(there) if there.exists() else name


def overridden(made: ConfigDict, settings: Sequence[str]) -> ConfigDict:
    """Apply the settings of the command line to `made` in place, and return it.

    Args:
      made: locked settings.
      settings: arguments "--config.NAME=VALUE", "--config.NAME" followed by "VALUE", or "--noconfig.NAME".

    Raises:
      Mistake: a setting is unknown, or its value has the wrong type.
    """
    names = [re.sub(r"^--?(no)?config\.", "", part.split("=")[0]) for part in settings if SETTING.match(part)]
    for name in names:
        _check_name(made, name)
    values = flags_lib.FlagValues()
    arguments = ["", *settings]
    kinds = {name: _at(made, name) for name in names if name.rpartition(".")[2] == "kind"}
    try:
        config_flags.DEFINE_config_dict("config", made, flag_values=values, sys_argv=arguments)
        rest = values(arguments)[1:]
    except (flags_lib.Error, ValueError, TypeError) as error:
        raise Mistake(_of_value(made, str(error))) from None
    if rest:
        raise Mistake(f"{rest[0]!r}: unexpected argument; write settings as --config.train.batch_size=8")
    for name, before in kinds.items():
        if _at(made, name) != before:
            _refuse_kind(name, before, _at(made, name))
    return made


def _at(made: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        made = made[part]
    return made


def _refuse_kind(name: str, before: str, after: str) -> NoReturn:
    """Raise a `Mistake`: each kind has its own settings, so changing the name alone would keep those of the old kind."""
    from ymplug_jax.models import language_models

    known = language_models.TABLE
    if after not in known:
        raise Mistake(f"config.{name}: unknown kind {after!r}; choose one of {', '.join(known)}")
    raise Mistake(
        f"config.{name}: cannot change {before!r} to {after!r}, which has other settings; choose the model with --config, e.g. "
        f"--config configs/mplug_video/pretrain.py:{next(iter(known[after].sizes))}"
    )


def _check_name(made: ConfigDict, name: str) -> None:
    node, where = made, "config"
    for part in name.split("."):
        if not isinstance(node, ConfigDict):
            raise Mistake(f"{where}: a single value, not a group of settings; remove .{part} from the name")
        if part not in node:
            raise Mistake(config.unknown(part, node.keys(), where))
        node, where = node[part], f"{where}.{part}"


def _of_value(made: ConfigDict, message: str) -> str:
    """Rewrite absl's message about the value of a setting as `<setting>: <what is wrong>`."""
    match = re.match(r"(?s)flag --config\.([^=]+)=(.*?): ", message)
    if not match:
        message = " ".join(message.split())
        name = message.removeprefix("Missing value for flag --")
        return f"{name}: no value given; write --{name}=VALUE" if name != message else message
    *groups, last = match[1].split(".")
    node = made
    for group in groups:
        node = node[group]
    kind = node.get_type(last)
    what = {
        **config.NAMES,
        tuple: "a tuple; write one such as ('a', 'b')",
        ConfigDict: "a group of settings; set each one by name",
    }.get(kind, "a valid value")
    return f"config.{match[1]}: {match[2]!r} is not {what}"
