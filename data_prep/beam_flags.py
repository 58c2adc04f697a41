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


def mistake(flags: list[str], ours: list[str], workers: bool) -> str | None:
    """Return what is wrong with the flags of Beam in one line, or None.

    Args:
      flags: all flags that are not those of this program.
      ours: the flags of this program, to recognise misspelt ones.
      workers: whether --workers was given.
    """
    runner = runner_of(flags)
    if workers and runner is not None and runner != "PortableRunner":
        return (
            f"--workers: does not apply to --runner {runner}; leave it out, Beam's own flags set the number of workers"
        )
    if not flags:
        return None
    known = _known()
    before = ""
    for flag in flags:
        name = flag.split("=")[0]
        value = not flag.startswith("--") and before.startswith("--") and "=" not in before
        if not value and name not in known and (problem := _unknown(name, runner, ours, known)):
            return problem
        before = flag
    return _refused(flags, runner)


def _unknown(name: str, runner: str | None, ours: list[str], known: frozenset[str]) -> str | None:
    """Return the message for a flag that neither this program nor Beam has, or None if it may be one of a job server's own."""
    near = difflib.get_close_matches(name, [*ours, *sorted(known)], 1, TYPOS if runner else 0.75)
    if near and name.startswith("--"):
        return f"{name}: unknown flag; did you mean {near[0]}?"
    if name.startswith("--") and runner in ("FlinkRunner", "SparkRunner", "PortableRunner"):
        return None  # e.g. --checkpointingInterval: the job server knows its own flags
    return f"{name}: unknown flag; neither this program nor Beam has it, --help lists the flags"


@functools.cache
def _known() -> frozenset[str]:
    """Return the flags of all of Beam's option classes."""
    from apache_beam.options.pipeline_options import PipelineOptions

    helps: list[str] = []
    PipelineOptions([]).get_all_options(add_extra_args_fn=lambda parser: helps.append(parser.format_help()))
    return frozenset(re.findall(r"(?<![\w-])--\w+", helps[0]))


def _refused(flags: list[str], runner: str | None) -> str | None:
    """Return the first objection of Beam to the values of its flags, in one line, or None."""
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
    from apache_beam.runners import create_runner

    if runner == "DataflowRunner" and not flag_value(flags, "--temp_location"):
        return "--runner DataflowRunner: needs --temp_location=gs://BUCKET/FOLDER; give it"  # Beam would make a bucket
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = PipelineOptions(flags)
            options.get_all_options()
            errors = PipelineOptionsValidator(options, create_runner(runner) if runner else None).validate()
    except SystemExit:  # argparse, after its usage
        return said.getvalue().strip().split("\n")[-1].split("error: ")[-1] + "; correct the flag"
    except Exception as error:  # whatever a client of the cloud raises
        return f"--runner {runner}: {str(error).splitlines()[0].rstrip('.')}; correct the flag"
    return f"--runner {runner}: {errors[0].rstrip('.')}; correct the flag" if errors else None
