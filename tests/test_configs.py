"""Every config builds, and its parameters and resolved settings equal golden files, so that a change shows up as a diff.

After an intended change, rewrite the golden files with `UPDATE_GOLDEN=1 python -m pytest tests/test_configs.py`.
"""

import dataclasses
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from configs.mplug2 import slices as mplug2_slices
from configs.mplug_chat import recipe as chat_recipe
from configs.mplug_chat import slices as chat_slices
from configs.mplug_video import recipe, slices
from ymplug_jax.core import config
from ymplug_jax.core import state as state_lib
from ymplug_jax.models import mplug_chat
from ymplug_jax.training import setup

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "params"
SETTINGS = Path(__file__).parent / "golden" / "configs"
FILES = sorted(
    p for p in (ROOT / "configs").rglob("*.py") if p.stem not in ("recipe", "slices", "curate")
)  # recipe and slices are not configs, and curate is no run: see tests/data_prep/curation/test_curation_settings.py
# (config, argument) -> mesh of its parameter table
VARIANTS = {
    ("mplug_video/pretrain", "1.3b"): {"fsdp": 8},
    ("mplug_video/pretrain", "2.7b"): {"fsdp": 4, "tensor": 2},
    ("mplug_video/pretrain", "1.3b,l14"): {"fsdp": 8},
    ("mplug_video/pretrain", "2.7b,l14"): {"fsdp": 8},
    ("mplug_video/pretrain", "bloomz-1b7"): {"fsdp": 8},
    ("mplug_video/pretrain", "bloomz-7b1"): {"fsdp": 8},
    ("mplug_video/pretrain", "qwen2.5-1.5b"): {"fsdp": 4, "tensor": 2},
    ("mplug_video/pretrain", "qwen2.5-7b"): {"fsdp": 4, "tensor": 2},
    ("mplug_video/pretrain", "qwen3-1.7b"): {"fsdp": 8},
    ("mplug_video/pretrain", "qwen3-8b"): {"fsdp": 2, "tensor": 4},
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
    ("mplug_chat/pretrain", "7b-adapters_abstractor"): {"fsdp": 8},
    ("mplug_chat/instruct", "7b-lora"): {"fsdp": 8},
    ("mplug_chat/instruct", "7b-all_linears"): {"fsdp": 4, "tensor": 2},
    ("mplug_chat/instruct", "qwen2.5-1.5b-lora"): {"fsdp": 4, "tensor": 2},
    ("mplug2/pretrain", "youku-b16"): {"fsdp": 8},
    ("mplug2/pretrain", "large"): {"fsdp": 4, "tensor": 2},
    ("mplug2/caption", "large"): {"fsdp": 8},
    ("mplug2/caption", "youku-b16"): {"fsdp": 8},
    ("mplug2/answer", "large"): {"fsdp": 4, "tensor": 2},
    ("tiny/mplug2_caption", "mplug_youku"): {},
    ("tiny/mplug2_caption", "mplug2"): {},
    ("tiny/mplug2_answer", "mplug_youku"): {},
    ("tiny/mplug2_answer", "mplug2"): {},
    ("mplug2/retrieve", "youku-b16"): {"fsdp": 8},
    ("mplug2/retrieve", "large"): {"fsdp": 4, "tensor": 2},
    ("mplug2/classify", "youku-b16"): {"fsdp": 8},
    ("mplug2/classify", "large"): {"fsdp": 4, "tensor": 2},
    ("tiny/mplug2_pretrain", "mplug_youku"): {},
    ("tiny/mplug2_pretrain", "mplug2"): {},
    ("tiny/mplug2_retrieve", "mplug_youku"): {},
    ("tiny/mplug2_retrieve", "mplug2"): {},
    ("tiny/mplug2_classify", "mplug_youku"): {},
    ("tiny/mplug2_classify", "mplug2"): {},
    ("tiny/alpro_pretrain", "youku"): {},
    ("tiny/alpro_pretrain", "salesforce"): {},
    ("tiny/alpro_prompter", None): {},
    ("tiny/alpro_classify", None): {},
    ("tiny/alpro_retrieve", None): {},
    ("tiny/pretrain", None): {},
    ("tiny/pretrain", "bloom"): {},
    ("tiny/pretrain", "qwen"): {},
    ("tiny/classify", None): {},
    ("tiny/caption", None): {},
    ("tiny/retrieve", None): {},
    ("tiny/match", None): {},
    ("tiny/language", None): {},
    ("tiny/chat_pretrain", "vision"): {},
    ("tiny/chat_pretrain", "all_linears"): {},
    ("tiny/chat_instruct", "vision"): {},
    ("tiny/chat_instruct", "decoder"): {},
    ("tiny/chat_instruct", "vision_lora"): {},
    ("tiny/chat_instruct", "adapters_abstractor"): {},
    ("tiny/chat_instruct", "lora"): {},
}


# Parameter counts of the released decoders on Hugging Face, see tests/convert/test_decoders.py.
FROZEN = {
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-8b": 8_190_735_360,
    "bloomz-1b7": 1_722_408_960,
    "bloomz-7b1": 7_069_016_064,
}


def resolved(name: str, argument: str | None) -> config.Experiment:
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location("a_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return config.from_config_dict(module.get_config(argument) if argument else module.get_config())


def load(name: str, argument: str | None) -> config.Experiment:
    """The config with a number of examples, so that it needs no shards."""
    experiment = resolved(name, argument)
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, examples=10_000_000))


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
    assert state_lib.count(run.frozen) == FROZEN.get(argument or "", state_lib.count(run.frozen))
    lines = []
    for kind, tree in (("trained", run.state.trainable), ("frozen", run.frozen), ("carried", run.state.carried)):
        for path, leaf in state_lib.flatten(tree).items():
            spec = ", ".join(str(axis) for axis in leaf.sharding.spec)
            lines.append(f"{path:<48} {kind:<8} {leaf.dtype!s:<9} {tuple(leaf.shape)!s:<24} ({spec})")
    text = "\n".join(sorted(lines)) + "\n"
    file = GOLDEN / f"{name.replace('/', '_')}{'_' + argument.replace(',', '_') if argument else ''}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == text


def arguments(name: str) -> Iterator[str | None]:
    """All arguments that a config accepts. The golden file holds the full settings of the first."""
    family, _, task = name.partition("/")
    if family == "mplug_chat":
        for size in chat_recipe.LLMS:
            yield from (f"{size}-{partition}" for partition in mplug_chat.PARTITIONS)
        yield from (f"7b-{partition}@{place}" for place in chat_slices.SLICES for partition in ("lora", "all_linears"))
        return
    if family == "mplug_video":
        for size in recipe.LLMS:
            yield size
            yield f"{size},l14"
            yield from (f"{size}@{place}" for place, layout in slices.SLICES.items() if size in layout.sizes(task))
    elif family == "tiny" and not task.startswith(("alpro", "chat", "mplug2")):
        yield from recipe.TINY
    else:
        yield from (argument for one, argument in VARIANTS if one == name)
    if name == "mplug2/pretrain":
        yield from (f"{size}@{place}" for place, layout in mplug2_slices.SLICES.items() for size in layout.batch)
    if name in ("mplug2/caption", "mplug2/answer"):
        yield from (f"large@{place}" for place in mplug2_slices.SLICES)


def flat(settings: object, before: str = "") -> dict[str, object]:
    """Flatten nested settings: {"train.batch_size": 8, ...}."""
    if not isinstance(settings, dict):
        return {before: settings}
    return {k: v for key, part in settings.items() for k, v in flat(part, f"{before}.{key}" if before else key).items()}


@pytest.mark.parametrize("name", sorted({name for name, _ in VARIANTS}))
def test_resolved_settings(name: str):
    """The golden file holds the full settings of the first argument and the differences of the others (null: no such setting)."""
    first, *others = arguments(name)
    full = json.loads(config.to_json(resolved(name, first)))
    changes = {}
    for argument in others:
        here, base = flat(json.loads(config.to_json(resolved(name, argument)))), flat(full)
        changes[argument] = {
            key: here.get(key) for key in sorted(here.keys() | base.keys()) if here.get(key) != base.get(key)
        }
    text = json.dumps({"argument": first, "settings": full, "others": changes}, indent=1, ensure_ascii=False) + "\n"
    file = SETTINGS / f"{name.replace('/', '_')}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert file.read_text(encoding="utf-8") == text


def test_a_slice_without_a_layout_says_what_there_is():
    with pytest.raises(ValueError, match=r"has no layout for pretrain with qwen3-8b; choose one of 1\.3b, 2\.7b"):
        load("mplug_video/pretrain", "qwen3-8b@v5e-16")


def test_unknown_sizes_are_named():
    with pytest.raises(
        ValueError, match=r"unknown argument '7b-all'; give SIZE-PARTITION with a size of 7b, bloomz-1b7"
    ):
        load("mplug_chat/instruct", "7b-all")
    with pytest.raises(ValueError, match=r"unknown size '13b'; choose one of 1.3b, 2.7b"):
        load("mplug_video/pretrain", "13b")
    with pytest.raises(ValueError, match="unknown vision tower 'h14'; choose one of b16, l14"):
        load("mplug_video/pretrain", "1.3b,h14")


@pytest.mark.parametrize("size", ["1.3b", "2.7b"])
@pytest.mark.parametrize("name", slices.SLICES)
def test_matching_on_a_slice_keeps_negatives_near(size: str, name: str) -> None:
    """A group has 8 rows or more, consists of the rows of whole chips, and divides the batch."""
    experiment, chips = load("mplug_video/match", f"{size}@{name}"), slices.SLICES[name].chips
    group, each = experiment.options["group"], experiment.train.batch_size // chips
    assert group >= 8 and group % each == 0 and experiment.train.batch_size % group == 0
    assert group == each or group // each <= 4
