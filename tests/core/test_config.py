"""Settings: locking, types, ranges and round trips."""

import dataclasses
import json

import pytest

from ymplug_jax.core import config, durations, exits
from ymplug_jax.core.config import Experiment, Train
from ymplug_jax.models import gpt3, language_models, mplug_video
from ymplug_jax.tasks import task


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
    with pytest.raises(ValueError, match=r"config.train: unknown setting 'batch_sise'; did you mean 'batch_size'?"):
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
    [
        ("2000 steps", 2000),
        ("1 step", 1),
        (" 1 step ", 1),
        ("0 steps", 0),
        ("10 epochs", 70),
        ("1 epoch", 7),
        ("2.5 epochs", 17),  # 17.5
        ("0.99 epochs", 6),  # 6.93
        ("5%", 10),
        ("5 %", 10),
        ("0.4%", 0),  # 0.8
        ("100%", 200),
    ],
)
def test_durations(text: str, steps: int):
    assert durations.steps_in(text, steps_per_epoch=7, total=200) == steps


@pytest.mark.parametrize(
    ("share", "total", "steps"),
    [
        ("10%", 57, 5),  # 5.7: the reference cuts off
        ("10%", 50, 5),
        ("7%", 100, 7),  # 7 / 100 * 100 is 7.000000000000001
        ("29%", 100, 29),  # 29 / 100 * 100 is 28.999999999999996
        ("58%", 100, 58),
        ("0.7%", 1000, 7),
        ("33.3%", 1000, 333),
        ("15%", 99, 14),  # 14.85
    ],
)
def test_a_share_is_cut_off_to_whole_steps(share: str, total: int, steps: int):
    assert durations.steps_in(share, steps_per_epoch=1, total=total) == steps


def test_part_of_an_epoch_is_exact():
    assert durations.steps_in("0.29 epochs", steps_per_epoch=100) == 29
    assert durations.steps_in("1.1 epochs", steps_per_epoch=10) == 11


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10",
        "ten epochs",
        "-1 steps",
        "3 days",
        "1e3 steps",
        "1,000 steps",
        "1_000 steps",
        "5",
        "٣ steps",
        ".5%",
        "inf steps",
    ],
)
def test_unreadable_durations(text: str):
    with pytest.raises(ValueError, match="cannot read the duration"):
        durations.steps_in(text, steps_per_epoch=7)


def test_a_share_above_the_whole_run_is_refused():
    with pytest.raises(
        exits.Mistake, match=r"^config.optim.warmup: '101%' is more than the whole run; give at most 100%$"
    ):
        durations.steps_in("101%", steps_per_epoch=7, total=200, setting="config.optim.warmup")


@pytest.mark.parametrize(("text", "zero"), [("0 steps", True), ("0.0 epochs", True), ("0%", True), ("1%", False)])
def test_no_duration_at_all(text: str, zero: bool):
    assert durations.is_zero(text) == zero


def settings(**groups) -> dict:
    return {"task": "pretrain", "model": {}} | groups


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"train": {"batch_size": "8"}},
            "config.train.batch_size: '8' is not a whole number; give an integer such as 8",
        ),
        (
            {"train": {"batch_size": 8.0}},
            "config.train.batch_size: 8.0 is not a whole number; give an integer such as 8",
        ),
        (
            {"train": {"batch_size": True}},
            "config.train.batch_size: True is not a whole number; give an integer such as 8",
        ),
        ({"train": {"batch_size": 0}}, "config.train.batch_size: 0 is too small; give 1 or more"),
        ({"train": {"max_bad_steps": 0}}, "config.train.max_bad_steps: 0 is too small; give 1 or more"),
        ({"train": {"duration": 10}}, "config.train.duration: 10 is not a string; write it in quotes"),
        ({"optim": {"lr": "1e-4"}}, "config.optim.lr: '1e-4' is not a number; give one such as 0.5"),
        ({"optim": {"lr": float("nan")}}, "config.optim.lr: nan is not finite; give a finite number"),
        ({"optim": {"clip": 0}}, "config.optim.clip: 0.0 is too small; give more than 0"),
        ({"data": {"augment": 1}}, "config.data.augment: 1 is not true or false; write True or False"),
        ({"optim": {"no_decay": ".*/bias"}}, "config.optim.no_decay: '.*/bias' is not a list; write ('a', 'b')"),
        ({"optim": {"lr_scales": [["a", 0.1, 2]]}}, "config.optim.lr_scales: ['a', 0.1, 2] has 3 elements; give 2"),
        ({"train": 3}, "config.train: 3 is not a group of settings; set each one as config.train.NAME"),
        ({"trian": {}}, "config: unknown setting 'trian'; did you mean 'train'?"),
    ],
)
def test_values_of_another_type_are_named(given: dict, message: str):
    with pytest.raises(exits.Mistake) as caught:
        config.from_config_dict(settings(**given))
    assert str(caught.value) == message


def test_ints_become_floats_and_lists_tuples():
    made = config.from_config_dict(settings(optim={"lr": 1, "lr_scales": [["a/.*", 1]]}, train={"frozen": ["b/.*"]}))
    assert made.optim.lr == 1.0 and isinstance(made.optim.lr, float)
    assert made.optim.lr_scales == (("a/.*", 1.0),) and made.train.frozen == ("b/.*",)
    assert config.from_config_dict(settings(train={"frozen": None})).train.frozen is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"model": {}}', '{"task": "pretrain", "model": {}, "train": []}']
)
def test_json_that_holds_no_settings(text: str):
    with pytest.raises(ValueError):
        config.from_json(text)


@pytest.mark.parametrize("kind", language_models.KINDS)
def test_the_kind_of_a_decoder_survives(kind: str):
    """Settings -> config.json -> settings -> module."""
    (lm, *_) = language_models.TABLE[kind].sizes.values()
    model = mplug_video.sized("tiny", "tiny").clone(llm=lm)
    read = config.from_json(config.to_json(Experiment(task="pretrain", model=model)))
    assert read.model["llm"]["kind"] == kind
    assert read == config.from_config_dict(config.to_config_dict(read))
    assert task.build(mplug_video.MPLUGVideo, read.model) == model


def test_a_run_without_a_kind_has_a_gpt3():
    fields = {"vocab": 64, "width": 32, "depth": 2, "heads": 2, "max_positions": 32}
    read = config.from_json(json.dumps(settings(model={"llm": fields, "classes": 3})))
    assert read.model == {"llm": {"kind": "gpt3", **fields}, "classes": 3}
    assert task.build(mplug_video.MPLUGVideo, read.model).llm == gpt3.GPT3(**fields)


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        ({"kind": "llama"}, "config.model.llm.kind: unknown kind 'llama'; choose one of gpt3, bloom, qwen"),
        ({"width": 8}, "config.model.llm.kind: unknown kind None; choose one of gpt3, bloom, qwen"),
        (7, "config.model.llm: 7 is not a mapping; give kind and the fields of that language model"),
        (
            {"kind": "qwen", "sparsity": 0.1},
            "config.model.llm: unknown setting 'sparsity'; choose one of depth, dtype, head_dim, heads, kv_heads, lora_dropout, "
            "lora_rank, lora_scale, lora_targets, max_positions, mlp, norm_eps, qk_norm, qkv_bias, remat, rope_theta, tied, vocab, width",
        ),
        (
            {"kind": "qwen", "heads": 6, "kv_heads": 4},
            "config.model.llm.kv_heads: 4 does not divide 6 heads; choose a divisor of config.model.llm.heads",
        ),
        (
            {"kind": "qwen", "head_dim": 15},
            "config.model.llm.head_dim: 15 is odd; give an even number, as rotary positions need",
        ),
        ({"kind": "qwen", "norm_eps": 0.0}, "config.model.llm.norm_eps: 0.0 is too small; give more than 0"),
        ({"kind": "qwen", "mlp": 0}, "config.model.llm.mlp: 0 is too small; give 1 or more"),
    ],
)
def test_settings_of_a_decoder_that_cannot_be(llm: object, message: str):
    with pytest.raises(exits.Mistake) as caught:
        task.build(mplug_video.MPLUGVideo, {"llm": llm})
    assert str(caught.value) == message
