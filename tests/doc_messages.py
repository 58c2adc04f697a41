"""The messages that end a program with a non-zero exit code, read from the source, and the page that lists them."""

import ast
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "…"  # in place of a value
CODES = {  # exit code by the name of the error
    "Mistake": 2, "ValueError": 2, "FileNotFoundError": 2, "FileExistsError": 2, "OSError": 2, "SourceError": 2,
    "UnknownModel": 2, "CheckpointError": 2, "CorruptRecord": 2, "BuildError": 2, "TrainingStopped": 2, "DecoderFailed": 2,
    "BrokenShard": 2, "BadArchive": 2, "PartError": 2, "Damaged": 2, "_Unfit": 2, "PartitionFailed": 2, "ArgumentTypeError": 2, "error": 2, "HostsError": 4, "PlaceFailed": 5, "PlaceError": 5,
}  # fmt: skip
# Files whose errors are caught and reported in other words, or are faults of a caller and keep their traceback.
CAUGHT = (
    "data/tf_example.py",
    "data/frames.py",
    "convert/torch_script.py",
    "convert/rules.py",
    "reports/contact_sheet.py",
)


class Area(NamedTuple):
    """What a user does, and the files that can stop it."""

    title: str
    files: tuple[str, ...]  # beginnings, below the repository


AREAS = (
    Area("Preparing data", ("data_prep/",)),
    Area("Flags and settings", (
        "ymplug_jax/command_line.py", "ymplug_jax/main.py", "ymplug_jax/core/config", "ymplug_jax/core/durations.py",
        "ymplug_jax/tasks/options.py", "ymplug_jax/tasks/names.py", "ymplug_jax/core/optim.py",
    )),
    Area("Data, tokenizers and class names", ("ymplug_jax/data/", "ymplug_jax/core/text_files.py", "ymplug_jax/core/index_file.py")),
    Area("Tasks and models", ("ymplug_jax/tasks/", "ymplug_jax/models/")),
    Area("Starting, resuming and training a run", ("ymplug_jax/training/", "ymplug_jax/core/progress.py")),
    Area("Meshes, several hosts and compilation", (
        "ymplug_jax/training/hosts.py", "ymplug_jax/training/cluster.py", "ymplug_jax/core/sharding.py", "ymplug_jax/analysis/",
    )),
    Area("Checkpoints", ("ymplug_jax/core/",)),
    Area("Converting weights", ("ymplug_jax/convert/",)),
    Area("Predictions, the Python API, reports and comparisons", ("ymplug_jax/",)),
)  # fmt: skip
LATER = (5,)  # areas that take their files before an earlier, wider one


class Message(NamedTuple):
    """One message, values replaced by GAP."""

    area: str
    text: str
    code: int

    @property
    def parts(self) -> tuple[str, str]:
        """(what is wrong, how to fix it); the second is empty where the message does not say it."""
        what, _, fix = self.text.rpartition("; ")
        return (what, fix) if what and re.search(r"[a-z]{2,}", fix) else (self.text, "")


def messages() -> list[Message]:
    """All messages, by area and in the order of the source."""
    found: dict[tuple[str, str], Message] = {}
    for folder in ("data_prep", "ymplug_jax"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            place = path.relative_to(ROOT).as_posix()
            if not place.endswith(CAUGHT):
                for text, code in _of_file(path):
                    found.setdefault((_area(place), text), Message(_area(place), text, code))
    order = [area.title for area in AREAS]
    return sorted(found.values(), key=lambda message: order.index(message.area))


def _area(place: str) -> str:
    first = [AREAS[i] for i in LATER] + [area for i, area in enumerate(AREAS) if i not in LATER]
    return next(area.title for area in first if place.startswith(area.files))


def _of_file(path: Path) -> Iterator[tuple[str, int]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    constants = {
        target.id: node.value
        for node in tree.body if isinstance(node, ast.Assign)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    for node in ast.walk(tree):  # attributes that hold a message until it is raised
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            constants[ast.unparse(node.targets[0])] = node.value
    for function in [*functions.values(), tree]:
        inside = [node for node in _own(function)]
        local = dict(constants)
        for node in inside:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                local[node.targets[0].id] = node.value
        for node in inside:
            name, values = _ending(node)
            if name in CODES:
                for text in _texts(values, local, functions):
                    if _says(text):
                        yield text, CODES[name]


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function or module, without those of functions in it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef):
            yield node
            yield from _own(node)


def _ending(node: ast.AST) -> tuple[str, list[ast.expr]]:
    """Name of the error that a node raises or returns, and its text; empty where there is none."""
    made = node.exc if isinstance(node, ast.Raise) else node.value if isinstance(node, ast.Return) else None
    if isinstance(made, ast.Call):
        name = ast.unparse(made.func).rpartition(".")[2]
        return name, made.args[1:2] if len(made.args) > 1 else made.args
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "parser.error":
        return "error", list(node.args)
    return "", []


def _texts(values: list[ast.expr], local: dict[str, ast.expr], functions: dict[str, ast.FunctionDef]) -> list[str]:
    """The texts that the argument of an error can be. What is put together by a function of the same file is what that returns."""
    if not values:
        return []
    value = values[0]
    if isinstance(value, ast.Name | ast.Attribute) and ast.unparse(value) in local:
        value = local[ast.unparse(value)]
    if isinstance(value, ast.IfExp):
        return [text for one in (value.body, value.orelse) for text in _texts([one], local, functions)]
    if made := _function(value, functions):
        return [text for one in _returns(made) for text in _texts([one], local, {})]
    text = skeleton(value, local)
    if isinstance(value, ast.JoinedStr) and not _says(text):
        for i, part in enumerate(value.values):
            inner = part.value if isinstance(part, ast.FormattedValue) else None
            inner = local.get(inner.id, inner) if isinstance(inner, ast.Name) else inner
            if inner is not None and (made := _function(inner, functions)):
                wholes = [ast.JoinedStr([*value.values[:i], one, *value.values[i + 1 :]]) for one in _returns(made)]
                return [skeleton(whole, local) for whole in wholes]
    return [text]


def _function(value: ast.expr, functions: dict[str, ast.FunctionDef]) -> ast.FunctionDef | None:
    return functions.get(ast.unparse(value.func).removeprefix("self.")) if isinstance(value, ast.Call) else None


def _returns(made: ast.FunctionDef) -> list[ast.expr]:
    found = [node.value for node in _own(made) if isinstance(node, ast.Return) and node.value is not None]
    return [
        one for value in found for one in ((value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,))
    ]


def _says(text: str) -> bool:
    """Whether a message is more than what is passed on."""
    return len(re.findall(r"[A-Za-z]{2,}", text)) >= 2


def skeleton(value: ast.expr, local: dict[str, ast.expr]) -> str:
    """The text of an expression with GAP in place of what is known at run time only."""
    return " ".join(re.sub(rf"{GAP}+", GAP, _skeleton(value, local)).split())


def _skeleton(value: ast.expr, local: dict[str, ast.expr]) -> str:
    if isinstance(value, ast.Constant):
        return str(value.value)
    if isinstance(value, ast.JoinedStr):
        return "".join(_skeleton(part, local) for part in value.values)
    if isinstance(value, ast.FormattedValue) and isinstance(value.value, ast.Name):
        known = local.get(value.value.id)
        return _skeleton(known, {}) if isinstance(known, ast.Constant) else GAP
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        return _skeleton(value.left, local) + _skeleton(value.right, local)
    return GAP


ROW = re.compile(r"^\| (.*?) \| (\d+) \| (.*?) \|$")


def rows(page: str) -> dict[tuple[str, str], tuple[int, str]]:
    """(area, what is wrong) -> (exit code, what to do) of every row of the page."""
    found, area = {}, ""
    for line in page.splitlines():
        if line.startswith("## "):
            area = line[3:]
        elif match := ROW.match(line):
            found[area, _text(match[1])] = (int(match[2]), _text(match[3]))
    return found


def _text(cell: str) -> str:
    """The text of a cell, of code or of words."""
    if code := re.fullmatch(r"(`+) ?(.*?) ?\1", cell):
        return code[2]
    return html.unescape(cell.replace("\\|", "|"))


def _code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _words(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "&#42;")


def aligned(page: str) -> str:
    """The page with the messages of the source; the words between the tables, and the advice of rows that stay, are kept."""
    known = rows(page)
    advice = {what: fix for (_, what), (_, fix) in known.items()}
    by_area: dict[str, list[str]] = {}
    for message in messages():
        what, fix = message.parts
        said = fix or advice.get(what, "")
        by_area.setdefault(message.area, []).append(f"| {_code(what)} | {message.code} | {_words(said)} |")
    lines, area, done = [], "", False
    for line in page.splitlines():
        if line.startswith("## "):
            area, done = line[3:], False
        if line.startswith("|") and area in by_area:
            if not done:
                lines += ["| message | exit code | what to do |", "|---|---|---|", *sorted(set(by_area[area]))]
            done = True
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"
