"""The table of settings: complete, and every setting has a sentence."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from ymplug_jax.core import config, config_file
from ymplug_jax.models import language_models
from ymplug_jax.tasks import names, options

ROOT = Path(__file__).parents[2]


def _hook() -> ModuleType:
    found = importlib.util.spec_from_file_location("settings_page", ROOT / "docs/hooks/settings_page.py")
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules["settings_page"] = module
    found.loader.exec_module(module)
    return module


HOOK = _hook()
GROUPS = HOOK.groups()


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: f"{group.file}:{group.name}")
def test_every_setting_has_a_sentence(group):
    for one in HOOK.settings(group):
        words = re.findall(r"\w+", one.meaning)
        assert len(words) >= 2, f"{group.file}: {group.name}.{one.name} needs a comment that says what it does"


def _leaves(values: dict, prefix: str) -> set[str]:
    """Dotted names of all settings; a dict that is itself a setting's value has fields of its own."""
    found = set()
    for name, value in values.items():
        found |= _leaves(value, f"{prefix}.{name}") if isinstance(value, dict) else {f"{prefix}.{name}"}
    return found


def _listed() -> set[str]:
    return {f"{group.prefix}.{one.name}" for group in GROUPS for one in HOOK.settings(group)}


CONFIGS = sorted(
    p for p in (ROOT / "configs").glob("*/*.py") if p.stem not in ("recipe", "slices", "curate", "__init__")
)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_setting_of_a_config_is_listed(file: Path):
    size = {"mplug_video": ":1.3b", "alpro": ""}.get(file.parent.name, "")
    if file.parent.name == "alpro" and file.stem in ("pretrain",):
        size = ":youku"
    made = options.complete(config_file.load(f"{file}{size}"))
    found = {name for name in _leaves(made.to_dict(), "config") if not name.endswith(".kind")}
    assert found <= _listed() | {"config.model", "config.options"}, sorted(found - _listed())


def test_every_task_with_options_and_every_decoder_is_listed():
    listed = {f"ymplug_jax.{g.file.removesuffix('.py').replace('/', '.')}": g for g in GROUPS}
    for name, module in names.tasks().items():
        fields = [field.name for field in dataclasses.fields(options.class_of(name))]
        if fields:
            assert [one.name for one in HOOK.settings(listed[module.__name__])] == fields
    for kind in language_models.TABLE.values():
        fields = {f.name for f in dataclasses.fields(kind.module)} - {"parent", "name"}
        assert {one.name for one in HOOK.settings(listed[kind.module.__module__])} == fields


def test_the_groups_of_a_run_are_complete():
    for name, cls in {"Data": config.Data, "Optim": config.Optim, "Mesh": config.Mesh, "Train": config.Train}.items():
        (group,) = (group for group in GROUPS if group.name == name)
        assert [one.name for one in HOOK.settings(group)] == [field.name for field in dataclasses.fields(cls)]


def test_comments_behind_and_above_are_read():
    text = (
        "class A:\n    # Says\n    # what x is.\n    x: int = 1\n    y: str = 'a'  # Says what y is.\n"
        "    z: int = option(  # Says what z is.\n        2, least=1\n    )\n    bare: int = 3\n"
    )
    import ast

    found = {one.name: one for one in HOOK._fields(text, ast.parse(text).body[0])}
    assert found["x"].meaning == "Says what x is." and found["y"].meaning == "Says what y is."
    assert found["z"].meaning == "Says what z is." and found["z"].default == "2"
    assert found["bare"].meaning == ""
