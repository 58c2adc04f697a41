"""Preparing a run: steps and warm-up from durations, and settings that contradict each other."""

from pathlib import Path

import jax
import numpy as np
import pytest

import tiny
from ymplug_jax.core import checkpoint, state
from ymplug_jax.core.exits import Mistake
from ymplug_jax.training import setup


def peaks(rate, steps: int, lr: float) -> list[int]:
    """Return the steps at the peak learning rate."""
    values = np.array([float(rate(jax.numpy.int32(step))) for step in range(steps)])
    return np.flatnonzero(np.isclose(values, lr)).tolist()


@pytest.mark.parametrize(
    ("warmup", "last"),
    [("10%", 4), ("7%", 2), ("5 steps", 4), ("0.5 epochs", 2)],  # 5.7, 3.99, 5 and 3.5 steps
)
def test_warm_up_is_rounded_down_to_whole_steps(warmup: str, last: int):
    """The run has 57 steps; the last warm-up step and the first one after it have the peak rate."""
    run = tiny.prepare(
        data={"examples": 57}, train={"duration": "57 steps"}, optim={"warmup": warmup, "lr": 0.5, "min_lr": 0.0}
    )
    assert (run.total_steps, run.steps_per_epoch) == (57, 7)
    assert peaks(run.rate, 12, 0.5) == [last, last + 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"duration": "0 steps"}}, "config.train.duration: '0 steps' is less than one step of this data"),
        (
            {"train": {"duration": "0.1 epochs"}},
            "config.train.duration: '0.1 epochs' is less than one step of this data",
        ),
        ({"train": {"duration": "10%"}}, "config.train.duration: '10%' is relative to itself"),
        ({"train": {"duration": "-5 steps"}}, "config.train.duration: cannot read the duration '-5 steps'"),
        ({"train": {"save_every": "0 steps"}}, "config.train.save_every: '0 steps' is not an interval"),
        ({"train": {"log_every": "0 steps"}}, "config.train.log_every: '0 steps' is not an interval"),
        ({"train": {"log_every": "often"}}, "config.train.log_every: cannot read the duration 'often'"),
        ({"train": {"save_every": "often"}}, "config.train.save_every: cannot read the duration 'often'"),
        ({"train": {"eval_every": "0%"}}, "config.train.eval_every: '0%' is not an interval"),
        ({"optim": {"warmup": "101%"}}, "config.optim.warmup: '101%' is more than the whole run"),
        ({"optim": {"warmup": "9 steps"}}, "config.optim.warmup: 9 steps, but the run has 8"),
    ],
)
def test_invalid_durations(changes: dict, message: str):
    with pytest.raises(ValueError) as caught:
        tiny.prepare(**changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("head", "tensor"), "unknown parameter axis 'head'; choose one of classes, embed, "),
        (("mlp", "tensr"), "unknown mesh axis 'tensr'; choose one of data, fsdp, tensor"),
    ],
)
def test_mesh_rules_with_unknown_names(rule: tuple[str, str], message: str):
    with pytest.raises(Mistake) as caught:
        tiny.prepare(mesh={"rules": (("embed", "fsdp"), rule)})
    assert str(caught.value).startswith(f"config.mesh.rules: {message}")


def test_an_interval_below_one_step_means_every_step():
    tiny.prepare(train={"save_every": "1%", "eval_every": "0.1 epochs"})


@pytest.mark.parametrize(("setting", "group"), [("frozen", "train"), ("no_decay", "optim"), ("lr_scales", "optim")])
def test_patterns_that_match_nothing(setting: str, group: str):
    pattern = "visoin/.*"
    value = ((pattern, 0.1),) if setting == "lr_scales" else (pattern,)
    with pytest.raises(Mistake, match=f"^config.{group}.{setting}: .*'visoin/\\.\\*' matches no parameter"):
        tiny.prepare(**{group: {setting: value}})


@pytest.mark.parametrize(("setting", "group"), [("frozen", "train"), ("no_decay", "optim"), ("lr_scales", "optim")])
def test_patterns_that_are_not_regular_expressions(setting: str, group: str):
    value = (("a(", 0.1),) if setting == "lr_scales" else ("a(",)
    with pytest.raises(Mistake, match=f"^config.{group}.{setting}: 'a\\(' is not a regular expression"):
        tiny.prepare(**{group: {setting: value}})


def test_adapters_start_fresh_on_weights_without_adapters(tmp_path: Path):
    """A LoRA run starts from a run without adapters; all other parameters must still be there."""
    first = tiny.prepare()
    now, frozen, _ = setup.fresh_state(first)
    params = state.merge(now.trainable, frozen)
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    checkpoints.save_frozen(frozen)
    checkpoints.save(now, 1, 8)
    checkpoints.close()

    model = tiny.MODEL.clone(llm=tiny.MODEL.llm.clone(lora_rank=2, lora_targets=("attn/.*", "mlp/.*")))
    second = setup.prepare(tiny.experiment(model, train={"init_from": str(tmp_path)}), jax.devices()[:1])
    found, origin = setup.fresh_params(second)
    fresh = {path for path, where in origin.items() if where == "fresh"}
    assert fresh and all(path.startswith("llm/blocks/lora/") for path in fresh)
    for path, leaf in state.flatten(params).items():
        np.testing.assert_array_equal(state.flatten(found)[path], leaf, err_msg=path)
    assert fresh <= set(state.flatten(second.state.trainable))
