"""How a run is laid out: steps and warm-up from durations, and settings that contradict each other."""

import jax
import numpy as np
import pytest

import tiny
from ymplug_jax.core.exits import Mistake


def peaks(rate, steps: int, lr: float) -> list[int]:
    """Steps at the highest rate."""
    values = np.array([float(rate(jax.numpy.int32(step))) for step in range(steps)])
    return np.flatnonzero(np.isclose(values, lr)).tolist()


@pytest.mark.parametrize(
    ("warmup", "last"),
    [("10%", 4), ("7%", 2), ("5 steps", 4), ("0.5 epochs", 2)],  # 5.7, 3.99, 5 and 3.5 steps
)
def test_warm_up_is_cut_off_to_whole_steps(warmup: str, last: int):
    """57 steps; the peak is the last step of the warm-up and the first one after it."""
    run = tiny.prepare(
        data={"examples": 57}, train={"duration": "57 steps"}, optim={"warmup": warmup, "lr": 0.5, "min_lr": 0.0}
    )
    assert (run.total_steps, run.steps_per_epoch) == (57, 7)
    assert peaks(run.rate, 12, 0.5) == [last, last + 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"duration": "0 steps"}}, "config.train.duration: '0 steps' are 0 steps of this data"),
        ({"train": {"duration": "0.1 epochs"}}, "config.train.duration: '0.1 epochs' are 0 steps of this data"),
        ({"train": {"duration": "10%"}}, "config.train.duration: '10%' is a share of itself"),
        ({"train": {"duration": "-5 steps"}}, "config.train.duration: cannot read the duration '-5 steps'"),
        ({"train": {"save_every": "0 steps"}}, "config.train.save_every: '0 steps' is no interval"),
        ({"train": {"log_every": "0 steps"}}, "config.train.log_every: '0 steps' is no interval"),
        ({"train": {"log_every": "often"}}, "config.train.log_every: cannot read the duration 'often'"),
        ({"train": {"save_every": "often"}}, "config.train.save_every: cannot read the duration 'often'"),
        ({"train": {"eval_every": "0%"}}, "config.train.eval_every: '0%' is no interval"),
        ({"optim": {"warmup": "101%"}}, "config.optim.warmup: '101%' is more than the whole run"),
        ({"optim": {"warmup": "9 steps"}}, "config.optim.warmup is 9 steps but the run has 8"),
    ],
)
def test_durations_that_make_no_run(changes: dict, message: str):
    with pytest.raises(ValueError) as caught:
        tiny.prepare(**changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("head", "tensor"), "no parameter of this model has an axis 'head'; there are classes, embed, "),
        (("mlp", "tensr"), "no mesh axis 'tensr'; there are data, fsdp, tensor"),
    ],
)
def test_rules_of_the_mesh_that_say_nothing(rule: tuple[str, str], message: str):
    with pytest.raises(Mistake) as caught:
        tiny.prepare(mesh={"rules": (("embed", "fsdp"), rule)})
    assert str(caught.value).startswith(f"config.mesh.rules: {message}")


def test_a_share_below_one_step_is_each_step():
    tiny.prepare(train={"save_every": "1%", "eval_every": "0.1 epochs"})


@pytest.mark.parametrize(("setting", "group"), [("frozen", "train"), ("no_decay", "optim"), ("lr_scales", "optim")])
def test_patterns_that_match_nothing(setting: str, group: str):
    pattern = "visoin/.*"
    value = ((pattern, 0.1),) if setting == "lr_scales" else (pattern,)
    with pytest.raises(Mistake, match=f"^config.{group}.{setting}: .*'visoin/\\.\\*' matches no parameter"):
        tiny.prepare(**{group: {setting: value}})


@pytest.mark.parametrize(("setting", "group"), [("frozen", "train"), ("no_decay", "optim"), ("lr_scales", "optim")])
def test_patterns_that_are_no_regex(setting: str, group: str):
    value = (("a(", 0.1),) if setting == "lr_scales" else ("a(",)
    with pytest.raises(Mistake, match=f"^config.{group}.{setting}: 'a\\(' is not a regular expression"):
        tiny.prepare(**{group: {setting: value}})
