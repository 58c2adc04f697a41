"""Checks of the flags that `build_shards` passes on to Beam, before any data is read."""

import contextlib
import difflib
import functools
import io
import re
from collections.abc import Iterable

SERVICES = ("DataflowRunner", "FlinkRunner", "SparkRunner", "PortableRunner")  # run jobs outside this process
TYPOS = 0.8  # similarity from which an unknown flag counts as a misspelt one


def flag_value(flags: Iterable[str], name: str) -> str | None:
    """Return the value of a flag, given as `--name=value` or `--name value`; the last one counts. None: not given."""
    value, before = None, ""
    for flag in flags:
        if before == name:
            value = flag
        elif flag.startswith(f"{name}="):
            value = flag[len(name) + 1 :]
        before = flag
    return value


def runner_of(flags: Iterable[str]) -> str | None:
    """Return the runner's name as Beam spells it. None: not given, so this program chooses one."""
    value = flag_value(flags, "--runner")
    return value and next((name for name in SERVICES if name.lower() == value.split(".")[-1].lower()), value)


def pools(flags: Iterable[str]) -> list[str]:
    """Return the addresses of the worker pools, which build_shards lets --environment_config list with commas; [] if there are none."""
    flags = list(flags)
    if runner_of(flags) != "PortableRunner" or (flag_value(flags, "--environment_type") or "").upper() != "EXTERNAL":
        return []
    return [address for address in (flag_value(flags, "--environment_config") or "").split(",") if address]


def check(flags: list[str], ours: list[str], workers: bool) -> None:
    """Check the flags of Beam.

    Args:
      flags: all flags that are not those of this program.
      ours: the flags of this program, to recognise misspelt ones.
      workers: whether --workers was given.

    Raises:
      ValueError: a flag is unknown or misspelt, or Beam refuses its value. One line.
    """
    runner = runner_of(flags)
    if workers and runner is not None and runner != "PortableRunner":
        raise ValueError(
            f"--workers: does not apply to --runner {runner}; leave it out, Beam's own flags set the number of workers"
        )
    if not flags:
        return
    known = _known()
    before = ""
    for flag in flags:
        name = flag.split("=")[0]
        value = not flag.startswith("--") and before.startswith("--") and "=" not in before
        if not value and name not in known:
            _check_unknown(name, runner, ours, known)
        before = flag
    _check_values(flags, runner)


def _check_unknown(name: str, runner: str | None, ours: list[str], known: frozenset[str]) -> None:
    """Raise ValueError for a flag that neither this program nor Beam has, unless it may be one of a job server's own."""
    near = difflib.get_close_matches(name, [*ours, *sorted(known)], 1, TYPOS if runner else 0.75)
    if near and name.startswith("--"):
        raise ValueError(f"{name}: unknown flag; did you mean {near[0]}?")
    if name.startswith("--") and runner in ("FlinkRunner", "SparkRunner", "PortableRunner"):
        return  # e.g. --checkpointing_interval: the job server knows its own flags
    raise ValueError(f"{name}: unknown flag, which neither this program nor Beam has; --help lists the flags")


@functools.cache
def _known() -> frozenset[str]:
    """Return the flags of all of Beam's option classes."""
    from apache_beam.options.pipeline_options import PipelineOptions

    helps: list[str] = []
    PipelineOptions([]).get_all_options(add_extra_args_fn=lambda parser: helps.append(parser.format_help()))
    return frozenset(re.findall(r"(?<![\w-])--\w+", helps[0]))


def _check_values(flags: list[str], runner: str | None) -> None:
    """Raise ValueError with the first objection of Beam to the values of its flags."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
    from apache_beam.runners import create_runner

    if runner == "DataflowRunner" and not flag_value(flags, "--temp_location"):  # Beam would make a bucket
        raise ValueError("--runner DataflowRunner: needs --temp_location too; give gs://BUCKET/FOLDER")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = PipelineOptions(flags)
            options.get_all_options()
            errors = PipelineOptionsValidator(options, create_runner(runner) if runner else None).validate()
    except SystemExit:  # argparse, after its usage
        problem = said.getvalue().strip().split("\n")[-1].split("error: ")[-1]
        raise ValueError(f"{problem}; correct the flag of Beam") from None
    except Exception as error:  # whatever a client of the cloud raises
        errors = str(error).splitlines()
    if errors:
        raise ValueError(f"--runner {runner}: {errors[0].rstrip('.')}; correct the flag of Beam")
