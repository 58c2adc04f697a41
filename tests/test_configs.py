"""Every config builds; its parameters stand as a table under review: a change shows up as a diff of a text file.

After a change that is meant, write the tables again with `UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py`.
"""

import importlib.util
import os
from pathlib import Path

import jax
import pytest

from configs.mplug_video import slices
from ymplug_jax.core import config
from ymplug_jax.core import state as state_lib
from ymplug_jax.training import setup

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "params"
FILES = sorted(
    p for p in (ROOT / "configs").rglob("*.py") if p.stem not in ("recipe", "slices")
)  # shared by the runs of a model
# file and argument -> mesh of the table
VARIANTS = {
    ("mplug_video/pretrain", "1.3b"): {"fsdp": 8},
    ("mplug_video/pretrain", "2.7b"): {"fsdp": 4, "tensor": 2},
    ("mplug_video/pretrain", "1.3b,l14"): {"fsdp": 8},
    ("mplug_video/pretrain", "2.7b,l14"): {"fsdp": 8},
    ("mplug_video/classify", "1.3b"): {"fsdp": 8},
    ("mplug_video/caption", "1.3b"): {"fsdp": 8},
    ("mplug_video/retrieve", "2.7b"): {"fsdp": 8},
    ("mplug_video/match", "2.7b"): {"fsdp": 4, "tensor": 2},
    ("alpro/pretrain", "youku"): {"fsdp": 8},
    ("alpro/pretrain", "youku,clip_l14"): {"fsdp": 4, "tensor": 2},
    ("alpro/pretrain", "salesforce"): {"fsdp": 8},
    ("alpro/prompter", "salesforce"): {},
    ("alpro/classify", "youku"): {"fsdp": 8},
    ("alpro/retrieve", "youku"): {"fsdp": 8},
    ("alpro/retrieve", "salesforce"): {"fsdp": 8},
    ("alpro/answer", "salesforce"): {"fsdp": 8},
    ("tiny/alpro_pretrain", "youku"): {},
    ("tiny/alpro_pretrain", "salesforce"): {},
    ("tiny/alpro_prompter", None): {},
    ("tiny/alpro_classify", None): {},
    ("tiny/alpro_retrieve", None): {},
    ("tiny/pretrain", None): {},
    ("tiny/classify", None): {},
    ("tiny/caption", None): {},
    ("tiny/retrieve", None): {},
    ("tiny/match", None): {},
    ("tiny/language", None): {},
}


def load(name: str, argument: str | None) -> config.Experiment:
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location("a_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.get_config(argument) if argument else module.get_config()
    with settings.unlocked():
        settings.data.examples = 10_000_000
    return config.from_config_dict(settings)


def test_every_config_has_a_table():
    assert {path.relative_to(ROOT / "configs").with_suffix("").as_posix() for path in FILES} == {
        name for name, _ in VARIANTS
    }


@pytest.mark.parametrize(("name", "argument"), list(VARIANTS), ids=[f"{n}:{a}" for n, a in VARIANTS])
def test_parameter_table(name: str, argument: str | None):
    experiment = load(name, argument)
    mesh = config.Mesh(**VARIANTS[name, argument])
    experiment = config.Experiment(**{**vars(experiment), "mesh": mesh})
    run = setup.prepare(experiment, jax.devices()[: 8 if VARIANTS[name, argument] else 1])
    lines = []
    for kind, tree in (("trained", run.state.trainable), ("frozen", run.frozen)):
        for path, leaf in state_lib.flatten(tree).items():
            spec = ", ".join(str(axis) for axis in leaf.sharding.spec)
            lines.append(f"{path:<48} {kind:<8} {leaf.dtype!s:<9} {tuple(leaf.shape)!s:<24} ({spec})")
    text = "\n".join(sorted(lines)) + "\n"
    file = GOLDEN / f"{name.replace('/', '_')}{'_' + argument.replace(',', '_') if argument else ''}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == text


def test_unknown_sizes_are_named():
    with pytest.raises(ValueError, match="size '13b' is unknown; there are 1.3b, 2.7b"):
        load("mplug_video/pretrain", "13b")
    with pytest.raises(ValueError, match="vision: b16, l14"):
        load("mplug_video/pretrain", "1.3b,h14")


@pytest.mark.parametrize("size", ["1.3b", "2.7b"])
@pytest.mark.parametrize("name", slices.SLICES)
def test_matching_on_a_slice_keeps_negatives_near(size: str, name: str) -> None:
    """Groups of 8 rows or more that are whole chips' rows, and as many as the batch has room for."""
    experiment, chips = load("mplug_video/match", f"{size}@{name}"), slices.SLICES[name].chips
    group, each = experiment.options.group, experiment.train.batch_size // chips
    assert group >= 8 and group % each == 0 and experiment.train.batch_size % group == 0
    assert group == each or group // each <= 4
