"""Settings: locked, typed, the same after a round trip."""

import dataclasses

import pytest

from ymplug_jax import config
from ymplug_jax.config import Experiment, Train


def make() -> Experiment:
    return Experiment(task="pretrain", model={"width": 8, "vision": {"depth": 2}}, train=Train(frozen=("llm/.*",)))


def test_round_trip_through_config_dict_and_json():
    experiment = make()
    assert config.from_config_dict(config.to_config_dict(experiment)) == experiment
    assert config.from_json(config.to_json(experiment)) == experiment


def test_misspelt_key_fails_on_its_line():
    locked = config.to_config_dict(make())
    with pytest.raises(AttributeError, match="batch_sise"):
        locked.train.batch_sise = 3
    with pytest.raises(ValueError, match="no setting named 'batch_sise'"):
        config.from_config_dict({"task": "x", "model": {}, "train": {"batch_sise": 3}})


def test_wrong_type_fails():
    with pytest.raises(TypeError):
        config.to_config_dict(make()).train.batch_size = "many"


def test_override_reaches_the_dataclass():
    locked = config.to_config_dict(make())
    locked.model.vision.depth = 5
    locked.optim.lr = 0.5
    experiment = config.from_config_dict(locked)
    assert experiment.model["vision"]["depth"] == 5 and experiment.optim.lr == 0.5
    assert dataclasses.replace(experiment, optim=make().optim, model=make().model) == make()


@pytest.mark.parametrize(
    ("text", "steps"),
    [("2000 steps", 2000), ("1 step", 1), ("10 epochs", 70), ("1 epoch", 7), ("5%", 10), ("2.5 epochs", 18)],
)
def test_durations(text: str, steps: int):
    assert config.steps_in(text, steps_per_epoch=7, total=200) == steps


@pytest.mark.parametrize("text", ["", "10", "ten epochs", "-1 steps", "3 days"])
def test_unreadable_durations(text: str):
    with pytest.raises(ValueError, match="cannot read the duration"):
        config.steps_in(text, steps_per_epoch=7)
