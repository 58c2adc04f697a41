"""All settings of a run as nested frozen dataclasses, and their way in: Python file -> locked ConfigDict -> Experiment.

A config file builds an `Experiment`, hands it to `to_config_dict`, and returns the result. The ConfigDict is made from
the dataclasses and locked, so a misspelt key or a wrong type on the command line fails on its own line. Past `main.py`,
code takes only the dataclass it needs.
"""

import dataclasses
import difflib
import json
import math
import re
import types
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from ymplug_jax.core.exits import Mistake

if TYPE_CHECKING:
    from flax import linen as nn
    from ml_collections import ConfigDict

    Model: TypeAlias = nn.Module | Mapping[str, Any]
else:
    Model = Any  # the annotation that `build` reads: settings are read without importing flax, and every value is taken

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the examples come from, and what is done to them on their way."""

    path: str = ""  # folder that data_prep.build_shards wrote; for task "language" also a text file, one title a line
    train_split: str = "train"
    eval_split: str = "validation"  # empty: never evaluate during training
    examples: int = 0  # size of the training split where `path` is empty, to plan a run without its data
    tokenizer: str = ""  # *.model (sentencepiece), tokenizer.json or vocab.txt
    classes: str = ""  # file of class names, one a line; empty: the 45 categories of Youku-mPLUG
    lower_case: bool = True  # of a BERT vocab.txt: letters in lower case, without accents
    frames: int = 4  # T, frames shown to the model out of those stored
    image_size: int = 224  # S, pixels
    max_tokens: int = 80  # L, beginning and end token included
    max_words: int = 30  # words by spaces that title cleaning keeps; hardly ever cuts Chinese
    augment: bool = True  # random crop, flip and RandAugment in training; off: the plain resize of evaluation
    wrap_uint8: bool = False  # with augment: values beyond 0 to 255 wrap before RandAugment, as in the reference; off: they are clipped
    threads: int = 8  # threads that read and decode, per host
    workers: int = 0  # processes that read and decode, per host; 0: threads alone
    skip_corrupt: bool = False  # count records with a broken checksum as invalid instead of stopping


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW, its schedule, and which parameters are treated otherwise."""

    lr: float = 1e-4  # peak
    min_lr: float = 1e-6
    warmup: str = "2000 steps"  # from 0 to the peak, both ends included
    schedule: str = "cosine"  # or "linear", the way down from the peak; "bert": linear, steps counted from 1
    weight_decay: float = 0.05
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    clip: float = 3.0  # of the global norm over the trainable parameters
    no_decay: tuple[str, ...] = ()  # path regexes, full match, without weight decay
    lr_scales: tuple[tuple[str, float], ...] = ()  # (path regex, factor); the first match wins, no match is 1.0


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How the devices are laid out, and what is cut along which axis."""

    data: int = -1  # replicas; -1: all devices that the other axes leave
    fsdp: int = 1  # parameters and batch are both cut along this axis
    tensor: int = 1  # heads, mlp width and vocabulary are cut along this axis
    # Axis word of a parameter -> mesh axis. Words that are not named stay whole.
    rules: tuple[tuple[str, str], ...] = (
        ("embed", "fsdp"),
        ("mlp", "tensor"),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("vocab", "tensor"),
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """How long and from where a run trains, and what it keeps."""

    batch_size: int = 8  # examples a step, over all hosts
    accumulate: int = 1  # micro-batches that one step is cut into
    duration: str = "10 epochs"
    seed: int = 42
    log_every: str = "50 steps"  # a bare number counts steps
    eval_every: str = "1 epochs"
    eval_examples: int = 1024  # at most, from the head of the evaluation split
    eval_scores_every: str = ""  # the task's own scores (CIDEr, recalls, top-1) over the same examples; empty: never
    best: str = ""  # name of one of these scores; the step where it is best is kept in the run's folder "best"
    save_every: str = "1 epochs"
    keep: int = 3  # newest checkpoints kept
    max_bad_steps: int = 20  # consecutive steps with a non-finite loss or gradient before the run stops
    init_from: str = ""  # "DIR" (every parameter), "llm=DIR,vision=DIR" (named subtrees), "NAME:STORED=DIR"
    other_tokenizer: bool = False  # init_from may have been trained with another tokenizer
    frozen: tuple[str, ...] | None = None  # path regexes; None: what the task freezes by itself
    keep_logits: bool = (
        False  # keep the logits for the backward pass instead of computing them again: faster, more memory
    )
    # In which frozen parameters are kept; "int8": stacked matrices in eight bits while a run computes, bfloat16 in checkpoints.
    frozen_dtype: str = "bfloat16"

    fused_kernels: bool = True  # attention in single kernels on TPU and NVIDIA; False: all of it by plain XLA

    def __post_init__(self) -> None:
        every = str(self.log_every).strip()  # a number of steps in configs, command lines and runs of older versions
        if every.isdecimal():
            object.__setattr__(self, "log_every", f"{int(every)} steps")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Every setting of a run: its task, the model, and the groups above."""

    task: str  # name of a task, see ymplug_jax/tasks/names.py
    model: Model  # the task's model, see ymplug_jax/models: a linen module in a config file, a dict of its fields afterwards
    data: Data = Data()
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    train: Train = Train()
    # `Options` of the task's file in a config file, a dict of its fields afterwards; see ymplug_jax/tasks/options.py
    options: object = dataclasses.field(default_factory=dict)


def settings_of(value: Any) -> Any:
    """Nested dataclasses (linen modules included) as nested plain dicts.

    A class with a class variable `kind` is one of several that can stand in its place: the dict begins with "kind".
    """
    if dataclasses.is_dataclass(value):
        fields = (f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name"))
        kind = getattr(type(value), "kind", None)
        first = {} if kind is None else {"kind": kind}
        return first | {name: settings_of(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {name: settings_of(part) for name, part in value.items()}
    return value


NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}  # of types, for messages
# The least value of settings that have one. A value below it fails late or trains nothing.
LEAST: Mapping[str, Mapping[str, float]] = {
    "config.data": {"examples": 0, "frames": 1, "image_size": 1, "max_tokens": 2, "max_words": 1, "threads": 1, "workers": 0},
    "config.optim": {"lr": 0, "min_lr": 0, "weight_decay": 0, "eps": 1e-30, "clip": 1e-30},
    "config.mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    "config.train": {
        "batch_size": 1, "accumulate": 1, "seed": 0, "eval_examples": 0, "keep": 1, "max_bad_steps": 1
    },
}  # fmt: skip
# The settings that have a limit above; betas are below it.
MOST: Mapping[str, Mapping[str, float]] = {
    "config.optim": {"b1": 1, "b2": 1},
    "config.train": {"seed": 2**32 - 1},
}


def to_config_dict(experiment: Experiment) -> "ConfigDict":
    """Locked ConfigDict with every setting of the experiment, for command-line overrides."""
    from ml_collections import ConfigDict, config_dict  # here: benchmarks run without it

    made = ConfigDict(settings_of(experiment), convert_dict=True)
    if made.train.frozen is None:  # ConfigDict knows the type of a setting by its value
        made.train.frozen = config_dict.placeholder(tuple)
    return made.lock()


def from_config_dict(config: "ConfigDict | Mapping[str, Any]") -> Experiment:
    """Experiment from a (possibly overridden) ConfigDict. An int given for a float setting becomes a float.

    Raises:
      Mistake: a key that no setting has, a value of another type, or one that is too small; the message names the setting.
    """
    plain = dict(config) if isinstance(config, Mapping) else config.to_dict()
    parts = {"data": Data, "optim": Optim, "mesh": Mesh, "train": Train}
    for key, cls in parts.items():
        plain[key] = build(cls, plain.get(key, {}), f"config.{key}")
    if isinstance(plain.get("model"), Mapping):
        plain["model"] = with_kinds(plain["model"])
    return build(Experiment, plain, "config")


def with_kinds(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's settings with the kind of its language model; runs from before there was a choice have a GPT-3."""
    llm = model.get("llm")
    if isinstance(llm, Mapping) and "kind" not in llm:
        return {**model, "llm": {"kind": "gpt3", **llm}}
    return dict(model)


def build(
    cls: type[T],
    values: object,
    where: str,
    *,
    least: Mapping[str, float] | None = None,
    most: Mapping[str, float] | None = None,
) -> T:
    """A dataclass of settings from a dict of its fields.

    Args:
      cls: the dataclass.
      values: name -> value.
      where: name of the group, for messages.
      least: smallest values by name; None: those of LEAST.
      most: largest values by name; None: those of MOST.

    Raises:
      Mistake: no dict, an unknown or missing name, a value of another type or out of range; the message names the setting.
    """
    lows: Mapping[str, float] = LEAST.get(where, {}) if least is None else least
    highs: Mapping[str, float] = MOST.get(where, {}) if most is None else most
    if not isinstance(values, Mapping):
        raise Mistake(f"{where}: {values!r} is no group of settings; set them one by one, as {where}.NAME")
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise Mistake(unknown(name, hints, where))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise Mistake(f"{where}.{field.name} is missing")
    hints |= {"log_every": int | str} if cls is Train else {}  # it was a number of steps once
    made = {name: checked(value, hints[name], f"{where}.{name}") for name, value in values.items()}
    for name, low in lows.items():
        if made.get(name, low) < low:
            below = "it must be above 0" if 0 < low < 1 else f"give {low} or more"
            raise Mistake(f"{where}.{name}: {made[name]!r} is too small; {below}")
    for name, high in highs.items():
        beta = name in ("b1", "b2")
        if name in made and (made[name] > high or (beta and not 0 <= made[name] < high)):
            raise Mistake(
                f"{where}.{name}: {made[name]!r} is out of range; give {'less than' if beta else 'at most'} {high}"
            )
    return cls(**made)


def unknown(name: str, known: Iterable[str], where: str) -> str:
    """What to say about a setting that there is not: the nearest one if one is near, else all there are."""
    near = difflib.get_close_matches(name, known, 1)
    names = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known)) or 'none'}"
    return f"{where}: no setting named {name!r}; {names}"


def checked(value: Any, kind: Any, where: str) -> Any:
    """The value of a setting as its annotation wants it: lists become tuples, ints become floats.

    Args:
      value: from the command line, a config file or JSON.
      kind: the annotation: bool, int, float, str, a tuple of these, or a union with None; any other takes every value.
      where: name of the setting.

    Raises:
      Mistake: a value of another type, or a float that is not finite.
    """
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        kinds = get_args(kind)
        if type(value) in kinds:
            return value
        kind = kinds[0]
        origin = get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise Mistake(f"{where}: {value!r} is no list; write ('a', 'b')")
        parts = get_args(kind)
        each = (parts[0],) * len(value) if parts[-1] is ... else parts
        if len(each) != len(value):
            raise Mistake(f"{where}: {value!r} has {len(value)} parts, {len(each)} are needed")
        return tuple(checked(part, one, where) for part, one in zip(value, each, strict=True))
    if kind in NAMES:
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            raise Mistake(f"{where}: {value!r} is not {NAMES[kind]}")
        if kind is float and not math.isfinite(value):
            raise Mistake(f"{where}: {value!r} is no finite number")
        return float(value) if kind is float else value
    return _as_tuples(value)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def to_json(experiment: Experiment) -> str:
    """The resolved settings as indented JSON, the form kept in the run's folder."""
    return json.dumps(settings_of(experiment), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> Experiment:
    """Inverse of `to_json`.

    Raises:
      ValueError: no JSON of settings.
    """
    read = json.loads(text)
    if not isinstance(read, dict):
        raise Mistake("no settings in it")
    return from_config_dict(read)


def steps_in(duration: str, *, steps_per_epoch: int, total: int = 0, setting: str = "") -> int:
    """Number of whole optimizer steps in "2000 steps", "10 epochs" or "5%" (of `total` steps).

    What a share or a part of an epoch has beyond whole steps is cut off, as the reference does: 10 % of 57 steps are 5.

    Args:
      duration: the text. A number is digits with at most one decimal point; blanks around it do not matter.
      steps_per_epoch: steps in one epoch.
      total: steps of the run; 0 where a share makes no sense.
      setting: name for the messages, e.g. "config.train.duration".

    Raises:
      Mistake: the text is none of these, or a share of more than 100 %.
    """
    name = f"{setting}: " if setting else ""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(steps?|epochs?|%)\s*", duration)
    if not match:
        raise Mistake(f'{name}cannot read the duration {duration!r}; write "2000 steps", "10 epochs" or "5%"')
    number, unit = Fraction(match[1]), match[2]  # exact: 7 % of 100 are 7, where floats give 7.000000000000001
    if unit != "%":
        return int(number * (steps_per_epoch if unit.startswith("epoch") else 1))
    if number > 100:
        raise Mistake(f"{name}{duration!r} is more than the whole run; give at most 100%")
    return int(number * total / 100)


def is_zero(duration: str) -> bool:
    """Whether a duration that `steps_in` can read is none at all: "0 steps", "0 epochs", "0%"."""
    return steps_in(duration, steps_per_epoch=10**9, total=10**9) == 0
