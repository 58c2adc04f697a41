"""MkDocs hook: generates settings.md, the table of every setting, from the dataclasses and modules that declare them.

The source is parsed, not imported, so that the page needs neither JAX nor a device. The meaning of a setting is the comment behind
its field or, where there is none, the comment lines directly above it.

    python docs/hooks/settings_page.py      # prints the page
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ymplug_jax"
PAGE = "settings.md"
NOT_SETTINGS = ("ClassVar",)  # annotations of class variables


class Group(NamedTuple):
    """Settings that one class declares."""

    title: str
    prefix: str  # of the settings on the command line
    file: str  # below ymplug_jax/
    name: str  # class
    note: str = ""


class Setting(NamedTuple):
    """One row of a table."""

    name: str
    type: str
    default: str
    meaning: str


RUN = (
    Group("Run", "config", "core/config.py", "Experiment"),
    Group("Data", "config.data", "core/config.py", "Data"),
    Group("Optimizer", "config.optim", "core/config.py", "Optim"),
    Group("Device mesh", "config.mesh", "core/config.py", "Mesh"),
    Group("Training", "config.train", "core/config.py", "Train"),
)
GROUPS_OF_A_RUN = ("data", "optim", "mesh", "train")  # tables of their own
MODEL = "config.model"
MODELS = (
    Group("mPLUG-video", MODEL, "models/mplug_video.py", "MPLUGVideo"),
    Group("Language model alone", MODEL, "tasks/mplug_video/language.py", "LanguageModel"),
    Group("ALPRO", MODEL, "models/alpro.py", "ALPRO"),
    Group("Chat model", MODEL, "models/mplug_chat.py", "MPLUGChat"),
    Group("mPLUG-2", MODEL, "models/mplug2.py", "MPLUG2"),
    Group("Video encoder", f"{MODEL}.vision", "models/timesformer.py", "TimeSformer"),
    Group("Video encoder of the chat model", f"{MODEL}.vision", "models/clip_vit.py", "ClipViT"),
    Group("Video encoder of mPLUG-2", f"{MODEL}.vision", "models/clip_vit.py", "VideoClipViT"),
    Group("Visual abstractor", f"{MODEL}.abstractor", "models/abstractor.py", "Abstractor", "mPLUG-video only."),
    Group(
        "Query abstractor",
        f"{MODEL}.abstractor",
        "models/query_abstractor.py",
        "QueryAbstractor",
        "The chat model only.",
    ),
    Group("Language model: GPT-3", f"{MODEL}.llm", "models/gpt3.py", "GPT3", "`config.model.llm.kind` is `gpt3`."),
    Group("Language model: BLOOM", f"{MODEL}.llm", "models/bloom.py", "Bloom", "`config.model.llm.kind` is `bloom`."),
    Group("Language model: Qwen", f"{MODEL}.llm", "models/qwen.py", "Qwen", "`config.model.llm.kind` is `qwen`."),
    Group("Text encoder of ALPRO and mPLUG-2", f"{MODEL}.text", "models/bert.py", "Text"),
    Group("ALPRO's fusion encoder", f"{MODEL}.fusion", "models/bert.py", "Fusion"),
    Group("mPLUG-2's universal layers", f"{MODEL}.universal", "models/universal.py", "Universal"),
    Group("mPLUG-2's fusion encoder", f"{MODEL}.fusion", "models/universal.py", "Fusion"),
    Group("mPLUG-2's decoder", f"{MODEL}.decoder", "models/bert_decoder.py", "Decoder"),
)
INTRO = """# Settings

Every setting of a run. A config file gives them their values, and the command line overrides each as `--config.GROUP.NAME=VALUE`:

```bash
python -m ymplug_jax.main --config configs/tiny/pretrain.py --workdir runs/pretrain --config.data.path=SHARDS \\
    --config.data.tokenizer=titles.model --config.optim.lr=2e-3 --config.train.duration="20 epochs"
```

The defaults below are those of the code; a config file replaces many of them. `RUN/config.json` holds the resolved settings of a run.
Durations are written as `"2000 steps"`, `"10 epochs"` or `"5%"` of the run. Lists are written as `"('a','b')"`.
"""
RUN_NOTES = {"options": "see [Options of the tasks](#options-of-the-tasks)", "model": "see [Models](#models)"}


def settings(group: Group) -> list[Setting]:
    """The settings of a group, in the order of the source."""
    text = (PACKAGE / group.file).read_text(encoding="utf-8")
    found = _fields(text, _class(ast.parse(text), group.name))
    return [one for one in found if not (group.prefix == "config" and one.name in GROUPS_OF_A_RUN)]


def tasks() -> Iterator[Group]:
    """One group for every task that declares `Options`."""
    for file in sorted((PACKAGE / "tasks").glob("*/*.py")):
        declared = [n.name for n in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef)]
        if "Options" in declared:
            family = file.parent.name
            task = file.stem if family == "mplug_video" else f"{family}_{file.stem}"
            place = file.relative_to(PACKAGE).as_posix()
            yield Group(f"Task `{task}`", "config.options", place, "Options")


def groups() -> list[Group]:
    """All groups of the page."""
    return [*RUN, *tasks(), *MODELS]


def page() -> str:
    """The page as Markdown."""
    parts = [INTRO]
    parts += [_table(group) for group in RUN]
    parts += ["## Options of the tasks\n\nA task takes its own options only; a task that is not listed has none.\n"]
    parts += [_table(group, level=3) for group in tasks()]
    parts += ["## Models\n\nThe fields of a model's modules are its settings.\n"]
    parts += [_table(group, level=3) for group in MODELS]
    return "\n".join(parts)


def on_files(files: Any, config: Any) -> Any:
    """MkDocs calls this with the files of the site; adds the page."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


def _class(tree: ast.Module, name: str) -> ast.ClassDef:
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)


def _fields(text: str, declared: ast.ClassDef) -> Iterator[Setting]:
    behind, above = _comments(text)
    for node in declared.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        kind = ast.unparse(node.annotation)
        if kind.startswith(NOT_SETTINGS):
            continue
        first, last = node.lineno, node.end_lineno or node.lineno
        inside = [behind.get(line) or above[line] for line in range(first, last + 1) if line in behind or line in above]
        lines, line = [], first - 1
        while line in above:
            lines.insert(0, above[line])
            line -= 1
        yield Setting(node.target.id, kind, _default(text, node.value), " ".join(inside or lines))


def _comments(text: str) -> tuple[dict[int, str], dict[int, str]]:
    """Comments by line: those behind code, and those on a line of their own."""
    behind: dict[int, str] = {}
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# fmt:", "# type:", "# noqa")):
            (alone if not token.line[: token.start[1]].strip() else behind)[token.start[0]] = token.string.lstrip("# ")
    return behind, alone


def _default(text: str, value: ast.expr | None) -> str:
    """The default as the source writes it; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        return "none"
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "option":
        value = value.args[0]
    written = ast.get_source_segment(text, value) or ""
    return ast.unparse(value) if "#" in written else written


def _table(group: Group, level: int = 2) -> str:
    lines = [f"{'#' * level} {group.title}", ""]
    if group.note:
        lines += [group.note, ""]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for one in settings(group):
        default = f"`{_cell(one.default)}`" if one.default else "required"
        lines.append(f"| `{group.prefix}.{one.name}` | `{_cell(one.type)}` | {default} | {_meaning(one, group)} |")
    return "\n".join([*lines, ""])


def _meaning(one: Setting, group: Group) -> str:
    text = _cell(one.meaning)
    text = text[:1].upper() + text[1:]
    text += "" if text.endswith((".", "?", "!")) else "."
    note = RUN_NOTES.get(one.name) if group.prefix == "config" else None
    return f"{text} {note[:1].upper()}{note[1:]}." if note else text


def _cell(text: str) -> str:
    """Text that stands in a cell of a table as it is."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(page())
