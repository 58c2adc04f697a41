"""Reads the files for clusters: Dockerfile and shell scripts that print their command."""

import fnmatch
import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Stage(NamedTuple):
    """A stage of a Dockerfile: FROM base AS name, and its other instructions as (name, words)."""

    base: str
    instructions: list[tuple[str, list[str]]]

    def words(self, instruction: str) -> list[list[str]]:
        return [words for name, words in self.instructions if name == instruction]


def stages(text: str) -> tuple[dict[str, str], dict[str, Stage]]:
    """Return the arguments before the first stage, and {name: stage}. Raises AssertionError for an unknown instruction."""
    arguments: dict[str, str] = {}
    found: dict[str, Stage] = {}
    lines = "\n".join(line for line in text.split("\n") if not line.startswith("#"))
    for line in filter(None, map(str.strip, lines.replace("\\\n", " ").split("\n"))):
        name, rest = line.split(None, 1)
        assert name in ("ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD"), line
        if name == "FROM":
            base, word, stage = rest.split()
            assert word == "AS" and stage not in found
            found[stage] = Stage(fill(base, arguments), [])
        elif not found:
            assert name == "ARG"
            key, value = rest.split("=")
            arguments[key] = value
        else:
            words = re.findall(r'"([^"]*)"', rest) if rest.startswith("[") else shlex.split(rest)
            list(found.values())[-1].instructions.append((name, [fill(word, arguments) for word in words]))
    return arguments, found


def fill(text: str, arguments: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], text)


def whole(name: str, found: dict[str, Stage]) -> list[tuple[str, list[str]]]:
    """Return the instructions of a stage after those of the stages that it begins with."""
    stage = found[name]
    return (whole(stage.base, found) if stage.base in found else []) + stage.instructions


def ignored(path: str, patterns: list[str]) -> bool:
    """Return whether .dockerignore leaves a path out: the last pattern that matches it or a folder above decides."""
    left_out = False
    above = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
    for pattern in patterns:
        rule = pattern.removeprefix("!")
        rules = {rule, rule.removeprefix("**/")}
        if any(fnmatch.fnmatch(each, one) for each in above for one in rules):
            left_out = not pattern.startswith("!")
    return left_out
