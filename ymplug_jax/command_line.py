"""The command line of `ymplug_jax.main`: flags, and settings from a config file or from the run itself.

Settings are written as `--config.train.batch_size=8`. They change what the file of `--config` gives, or, without one, what the run
in `--workdir` was started with. Every mistake is a `Mistake` of one line; nothing here prints or exits but `--help`.
"""

import argparse
import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

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
        """argparse prints its usage and exits; here all mistakes end alike."""
        flag, _, what = message.partition(": ")
        flag = flag.removeprefix("argument ")
        raise Mistake(f"{flag}: {what}" if what else message)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _mode(text: str) -> str:
    if text in MODES:
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is no mode; {near(text, MODES)}")


def near(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names as a question, or all of them."""
    known = list(known)
    found = difflib.get_close_matches(name, known, 1)
    return f"did you mean {found[0]}?" if found else f"there are {', '.join(known)}"


def parser(doc: str) -> argparse.ArgumentParser:
    """All flags but the settings."""
    made = _Parser(
        prog="python -m ymplug_jax.main", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False, epilog="Settings follow as --config.data.path=..., see ymplug_jax/core/config.py.",
    )  # fmt: skip
    add = made.add_argument
    add(
        "--config",
        metavar="FILE.py[:SIZE]",
        help="configs/<model>/<task>.py[:size]; without it, the run's own settings",
    )
    add("--workdir", help="folder of the run (local or gs://): checkpoints, metrics, settings")
    add("--mode", type=_mode, default="train", metavar="|".join(MODES), help="what to do (default: train)")
    add("--topology", default="v5e:4x4", help="compile: the TPU slice, e.g. v5e:4x8, v5p:4x4x4, v6e:8x8")
    add("--slices", type=_whole, default=1, help="compile: so many of them; data runs over the network between them")
    add(
        "--steps", type=_whole, default=30,
        help="bench: steps that are timed, 2 or more (default 30). As many come before them to warm up, at most 3, and with "
        "--workdir 3 more are profiled: --steps 3 is 6 steps, 9 with a profile; the fewest are 4",
    )  # fmt: skip
    add("--examples", type=_whole, default=0, help="eval: only so many examples; 0: the whole split")
    add(
        "--seeds", type=_whole, default=1,
        help="so many runs, with config.train.seed and the ones after it, in folders seed_N of --workdir; "
        "eval: mean and deviation",
    )  # fmt: skip
    add("--coordinator", help="host:port of process 0, for plain hosts; TPU pods need none")
    add("--processes", type=_whole, help="number of processes, with --coordinator")
    add("--process_id", type=_whole, help="number of this process, with --coordinator")
    add("--start_timeout", type=_whole, default=300, help="seconds until every process must have come, with several")
    add("--heartbeat", type=_whole, default=100, help="seconds of silence after which a process counts as dead")
    return made


def parse(argv: Sequence[str], doc: str = "") -> tuple[argparse.Namespace, list[str]]:
    """(flags, arguments that are settings, as they were written).

    Args:
      argv: without the program's name.
      doc: of the program, for --help.

    Raises:
      Mistake: an unknown flag, or a value of another type.
    """
    settings: list[str] = []
    others: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if not SETTING.match(argument):
            others.append(re.sub(r"^-(?=\w\w)", "--", argument))  # -mode=eval is read as well
            continue
        settings.append(argument)
        # A value may follow by itself. Whether it belongs to the setting is known with the setting's type.
        if "=" not in argument and rest and not re.match(r"--?[A-Za-z]", rest[0]):
            settings.append(rest.pop(0))
    made = parser(doc)
    flags, unknown = made.parse_known_args(others)
    for argument in unknown:
        if not argument.startswith("-"):
            raise Mistake(f"{argument!r}: nothing takes this; settings are written as --config.train.batch_size=8")
        name = argument.split("=")[0]
        known = [option for action in made._actions for option in action.option_strings if option.startswith("--")]
        raise Mistake(f"{name}: no such flag; {near(name, known)}")
    return flags, settings


def experiment_of(flags: argparse.Namespace, settings: list[str]) -> Experiment:
    """The settings of `--config`, or of the run in `--workdir`, with those of the command line over them.

    Args:
      flags: of `parse`.
      settings: of `parse`.

    Raises:
      Mistake: neither a config file nor a run, or settings that cannot be read; names the nearest setting there is.
    """
    if flags.config is not None:
        made = config_file.load(flags.config)
    elif flags.workdir:
        made = config.to_config_dict(_of_run(flags.workdir, flags.seeds))
    else:
        raise Mistake(
            "--config: missing; give a file, as --config configs/tiny/pretrain.py, or --workdir with the folder of a run to "
            "take its settings"
        )
    from ymplug_jax.tasks import options

    task = _task_given(settings)
    if task is not None and task != made.get("task"):
        with made.unlocked():  # the options of the file are those of another task
            made.task, made.options = task, ConfigDict()
    experiment = config.from_config_dict(overridden(options.complete(made), settings))
    return options.completed(experiment)


def _task_given(settings: Sequence[str]) -> str | None:
    """The value of config.task on the command line, None where it is not there."""
    for i, part in enumerate(settings):
        name, equals, value = part.partition("=")
        if re.fullmatch(r"--?config\.task", name):
            return value if equals else next(iter(settings[i + 1 :]), "")
    return None


def _of_run(name: str, seeds: int) -> Experiment:
    """The settings that a run was started with; of several seeds' runs, those of the first. A tokenizer that is no longer where it
    was is the run's own copy, which is the same."""
    from ymplug_jax.core import checkpoint_files
    from ymplug_jax.tasks import options
    from ymplug_jax.training import run_folder

    folder = checkpoint_files.folder_of(name)
    if seeds > 1 and not (folder / run_folder.CONFIG).exists():
        found = [place for place in folder.glob("seed_*") if place.name.removeprefix("seed_").isdecimal()]
        folder = min(found, key=lambda place: int(place.name.removeprefix("seed_")), default=folder)
    if not (folder / run_folder.CONFIG).exists():
        raise Mistake(
            f"--config: missing, and --workdir {name} holds no run whose settings could be taken (no {run_folder.CONFIG}); give a "
            "file, as --config configs/tiny/pretrain.py, or the folder of a run"
        )
    experiment = run_folder.read_settings(folder)
    data = experiment.data
    if data.tokenizer and not checkpoint_files.folder_of(data.tokenizer).exists():
        kept = run_folder.kept_tokenizer(folder, experiment)
        data = dataclasses.replace(data, tokenizer=str(kept) if kept else data.tokenizer)
    data = dataclasses.replace(data, path=_from_there(folder, data.path))
    files = {file.name: _from_there(folder, file.value) for file in options.files(experiment)}
    return options.with_values(dataclasses.replace(experiment, data=data), files)


def _from_there(folder: epath.Path, name: str) -> str:
    """A relative place that is not here but below the folder that the run in `folder` was started from is meant there."""
    from ymplug_jax.core import checkpoint_files
    from ymplug_jax.training import run_folder

    if not name or "://" in name or checkpoint_files.folder_of(name).exists():
        return name
    try:
        started = json.loads((folder / run_folder.ENVIRONMENT).read_text(encoding="utf-8"))["folder"]
        there = epath.Path(started) / name
    except (OSError, ValueError, KeyError, TypeError):  # of an older version, or damaged
        return name
    return str(there) if there.exists() else name


def overridden(made: ConfigDict, settings: Sequence[str]) -> ConfigDict:
    """The settings with those of the command line over them; `made` is changed.

    Args:
      made: locked settings.
      settings: "--config.NAME=VALUE", "--config.NAME", "VALUE", or "--noconfig.NAME".

    Raises:
      Mistake: a setting that there is not, or a value of another type.
    """
    names = [re.sub(r"^--?(no)?config\.", "", part.split("=")[0]) for part in settings if SETTING.match(part)]
    for name in names:
        _check_name(made, name)
    values = flags_lib.FlagValues()
    arguments = ["", *settings]
    try:
        config_flags.DEFINE_config_dict("config", made, flag_values=values, sys_argv=arguments)
        rest = values(arguments)[1:]
    except (flags_lib.Error, ValueError, TypeError) as error:
        raise Mistake(_of_value(made, str(error))) from None
    if rest:
        raise Mistake(f"{rest[0]!r}: nothing takes this; settings are written as --config.train.batch_size=8")
    return made


def _check_name(made: ConfigDict, name: str) -> None:
    node, where = made, "config"
    for part in name.split("."):
        if not isinstance(node, ConfigDict):
            raise Mistake(f"{where}: a value, not a group of settings; there is nothing named {part!r} below it")
        if part not in node:
            raise Mistake(config.unknown(part, node.keys(), where))
        node, where = node[part], f"{where}.{part}"


def _of_value(made: ConfigDict, message: str) -> str:
    """What to say instead of absl's words about a value."""
    match = re.match(r"(?s)flag --config\.([^=]+)=(.*?): ", message)
    if not match:
        message = " ".join(message.split())
        name = message.removeprefix("Missing value for flag --")
        return f"{name}: a value is missing; write --{name}=VALUE" if name != message else message
    *groups, last = match[1].split(".")
    node = made
    for group in groups:
        node = node[group]
    kind = node.get_type(last)
    what = {**config.NAMES, tuple: "a list as ('a', 'b')", ConfigDict: "a group of settings"}.get(kind, "a value of it")
    return f"config.{match[1]}: {match[2]!r} is not {what}"
