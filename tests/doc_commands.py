"""The commands of the fenced blocks of a page, as bash expands them, and the check that their programs would accept them."""

import argparse
import ast
import configparser
import importlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh", "shell", "console")
STARTS = ("python ", "make ", "pip ", "taskset ", "/usr/bin/time ")  # of blocks without a language that are commands
# bash calls the handler for every program, since there is none on its path. Words are separated by a byte that no text has.
PREAMBLE = """
command_not_found_handle() { printf 'C'; printf '%s\\001' "$@"; printf '\\002'; }
. () { :; }
source () { :; }
cd () { :; }
exit () { :; }
"""
OTHERS = (
    "git",
    "gcloud",
    "kubectl",
    "xpk",
    "mkdocs",
    "pre-commit",
    "chromium",
    "twine",
    "tensorboard",
    "xprof",
    "docker",
    "modelscope",
    "rm",
    "split",
)


class Command(NamedTuple):
    """A command of a page."""

    place: str  # page:line of its block
    words: tuple[str, ...]


class Parsed(Exception):
    """A program's parser accepted the flags."""


def pages() -> list[Path]:
    """All pages whose commands are checked."""
    names = ("README.md", "README.zh.md", "BENCHMARKS.md", "SCALING.md", "CONTRIBUTING.md", "data_prep/README.md")
    found = [ROOT / name for name in names if (ROOT / name).exists()]
    return [*found, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, language, content) of each fenced block."""
    for match in BLOCK.finditer(text):
        language, content = match[2], re.sub(rf"(?m)^{match[1]}", "", match[3])
        if not language and content.lstrip("$ ").startswith(STARTS):
            language = "bash"
        yield text.count("\n", 0, match.start()) + 1, language, content


def commands(page: Path) -> list[Command]:
    """The commands of a page. Its blocks share their variables, as if a reader typed them one after the other.

    Raises:
      AssertionError: bash cannot read a block.
    """
    script = [PREAMBLE]
    for line, language, content in blocks(page.read_text(encoding="utf-8")):
        if language in SHELL:
            script += [f"printf 'B{line}\\002'", _plain(content)]
    with tempfile.TemporaryDirectory() as folder:  # redirections of the commands write here
        done = subprocess.run(
            ["bash", "--norc"], input="\n".join(script), capture_output=True, text=True, cwd=folder, check=False,
            env={"PATH": "/nowhere", "HOME": "/home/reader", "LC_ALL": "C.UTF-8"}, timeout=20, executable="/bin/bash",
        )  # fmt: skip
    assert done.returncode in (0, 127) and not done.stderr, f"{page.name}: {done.stderr}"
    found, line = [], "0"
    for part in done.stdout.split("\002"):
        if part.startswith("B"):
            line = part[1:]
        elif part.startswith("C"):
            found.append(
                Command(f"{page.relative_to(ROOT) if page.is_relative_to(ROOT) else page}:{line}", _words(part))
            )
    return found


def _plain(block: str) -> str:
    """A block whose programs all go to the handler: those with a slash in their name would be run."""
    block = re.sub(r"(?m)^\$ ", "", block)
    block = re.sub(
        r"(^|[\s;(])(?:\S*/)?(?:bin|env)/(?=(?:python3?|pip|mkdocs|pytest|ruff|mypy|pre-commit)\b)", r"\1", block
    )
    block = re.sub(r"/usr/bin/time (-\w+ )*|\btaskset -c \S+ ", "", block)
    return re.sub(r"(?m)(^|[\s;(])(?:\./)?(launch/\S+\.sh)", r"\1run_script \2", block)


def _words(part: str) -> tuple[str, ...]:
    return tuple(part[1:].split("\001")[:-1])


def known_runs(found: Sequence[Command]) -> dict[str, list[str]]:
    """The configs that the pages start each run's folder with."""
    runs: dict[str, list[str]] = {}
    for command in found:
        words = " ".join(command.words).replace("=", " ").split()
        if "--config" in words and "--workdir" in words:
            runs.setdefault(words[words.index("--workdir") + 1], []).append(words[words.index("--config") + 1])
    return runs


def problem(command: Command, runs: dict[str, list[str]]) -> str:
    """What is wrong with a command; empty where its program accepts it."""
    program, *words = command.words
    if program == "run_script" or program == "sbatch":
        script = next((word for word in words if word.endswith(".sh")), "")
        return "" if (ROOT / script).is_file() and script else f"no script {script!r}"
    if program in ("python", "python3"):
        return _of_python(words, runs)
    if program == "make":
        return _of_make(words)
    if program == "pip":
        return _of_pip(words)
    if program == "pytest":
        return _of_paths(words)
    return "" if program in OTHERS else f"no program {program!r} is known"


def _of_python(words: list[str], runs: dict[str, list[str]]) -> str:
    if words[:1] != ["-m"]:
        return "" if words and (ROOT / words[0]).is_file() else f"python {' '.join(words[:2])}: no such file"
    module, words = words[1], words[2:]
    if module in ("venv", "build"):
        return ""
    if module == "pip":
        return _of_pip(words)
    if module == "pytest":
        return _of_paths(words)
    if module.startswith("apache_beam."):
        return "" if importlib.util.find_spec(module) else f"no module {module!r}"
    if not module.startswith(("ymplug_jax", "data_prep", "benchmarks")):
        return f"no module {module!r} is known"
    try:
        if module == "ymplug_jax.main":
            _main(words, runs)
        elif module == "data_prep.build_shards":
            _build_shards(words)
        elif module == "data_prep.curate":
            _curate(words)
        else:
            _parse(module, words)
    except (Exception, SystemExit) as error:
        return f"{module}: {error}"
    return ""


def _main(words: list[str], runs: dict[str, list[str]]) -> None:
    """Flags and settings; those of a run without --config are checked with the configs that the pages start it with."""
    from ymplug_jax import command_line

    flags, settings = command_line.parse(words)
    if flags.config:
        configs = [flags.config]
    else:
        folder = (flags.workdir or "").removesuffix("/best")
        configs = runs.get(folder) or sorted(str(p) for p in (ROOT / "configs/tiny").glob("*.py") if p.stem != "recipe")
    errors = []
    for config in configs:
        flags.config = str(ROOT / config[config.find("configs/") :])
        try:
            command_line.experiment_of(flags, list(settings))
        except ValueError as error:
            errors.append(str(error))
    if len(errors) == len(configs):
        raise ValueError(errors[0] if errors else "--config and --workdir: missing")


def _build_shards(words: list[str]) -> None:
    from data_prep import build_flags

    _with_beam(build_flags.parser(), words)


def _curate(words: list[str]) -> None:
    from data_prep import curate

    _with_beam(curate.parser(), words)


def _with_beam(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Parse flags behind which flags of Beam may follow."""
    with _said(io.StringIO()):
        _, rest = parser.parse_known_args(words)
    if rest and not any(word.startswith("--runner") for word in rest):
        raise ValueError(f"unknown flags {rest}")


@contextmanager
def _said(printed: io.StringIO) -> Iterator[None]:
    """What a parser prints before it exits becomes the message of an error."""
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            yield
    except SystemExit as error:
        raise ValueError(printed.getvalue().strip().splitlines()[-1]) from error


def _parse(module: str, words: list[str]) -> None:
    """Run a program up to the end of its parsing.

    Raises:
      Exception: of whatever kind the program has for flags that it refuses.
    """
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *args: Any, **more: Any) -> None:
        parse(self, *args, **more)
        raise Parsed

    name = f"{module}.__main__" if (ROOT / module.replace(".", "/") / "__main__.py").exists() else module
    printed = io.StringIO()
    patched = mock.patch.object(argparse.ArgumentParser, "parse_args", stop)
    with patched, mock.patch.object(sys, "argv", [module, *words]), mock.patch.dict(os.environ), _said(printed):
        try:
            importlib.import_module(name).main()
        except Parsed:
            return
    raise ValueError(f"its parser was not reached: {printed.getvalue().strip()}")


def _of_make(words: list[str]) -> str:
    targets = re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    variables = re.findall(r"(?m)^([A-Z]+) \?=", (ROOT / "Makefile").read_text(encoding="utf-8"))
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in (variables if equals else targets):
            return f"make: no {'variable' if equals else 'target'} {name}"
    return ""


def _of_pip(words: list[str]) -> str:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for word in words:
        if match := re.match(r"(?:.*/|ymplug_jax|\.|/home/reader/ymplug_jax)\[([\w,]+)\]", word):
            unknown = [extra for extra in match[1].split(",") if extra not in setup["options.extras_require"]]
            if unknown:
                return f"pip: no extra {unknown[0]}"
    return ""


def _of_paths(words: list[str]) -> str:
    missing = [word for word in words if word.startswith("tests") and not (ROOT / word.split("::")[0]).exists()]
    return f"no file {missing[0]}" if missing else ""


def python_problem(content: str) -> str:
    """Whether a block of Python can be read."""
    try:
        ast.parse(content)
    except SyntaxError as error:
        return f"line {error.lineno}: {error.msg}"
    return ""
