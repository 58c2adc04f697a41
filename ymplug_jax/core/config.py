"""All settings of a run as nested frozen dataclasses: Python file -> locked ConfigDict -> Experiment.

A config file builds an `Experiment` and returns `to_config_dict(experiment)`. The ConfigDict is typed by the dataclasses and
locked, so a misspelt key or a value of the wrong type on the command line fails where it is given. Behind `main.py`, each
function takes only the dataclass it needs.

The comment of a field, behind it or in the lines above it, is its description in the documentation's table of settings.
"""

import dataclasses
import difflib
import json
import math
import types
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

from ymplug_jax.core.exits import Mistake

if TYPE_CHECKING:
    from flax import linen as nn
    from ml_collections import ConfigDict

    Model: TypeAlias = nn.Module | Mapping[str, Any]
else:
    Model = Any  # `build` reads the annotation; `Any` accepts every value and avoids importing flax

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Data:
    """Where the examples come from and how they are preprocessed."""

    # Folder of the shards that data_prep.build_shards wrote, or several folders separated by commas, which training mixes. For the
    # task "language" also text files (*.txt), one text per line.
    path: str = ""
    # With several folders: a number for each, in proportion to the records (or batches) drawn from it. Empty: by size.
    weights: tuple[float, ...] = ()
    train_split: str = "train"  # Split that training reads.
    eval_split: str = "validation"  # Split that evaluation reads. Empty: training runs no evaluation.
    examples: int = 0  # Size of the training split, used only where `path` is empty, to plan a run without its data.
    tokenizer: str = ""  # Tokenizer file: *.model (sentencepiece), tokenizer.json or vocab.txt (BERT).
    classes: str = ""  # File of class names, one per line. Empty: the 45 categories of Youku-mPLUG.
    lower_case: bool = True  # With a BERT vocab.txt: lower-case the text and strip accents before tokenizing.
    frames: int = 4  # Number of frames T sampled from each stored clip.
    image_size: int = 224  # Height and width of a frame after preprocessing, in pixels.
    max_tokens: int = 80  # Maximum text length L in tokens, start and end token included.
    # Title cleaning keeps at most this many words, separated by spaces. Chinese text has few spaces and is rarely cut.
    max_words: int = 30
    # Apply random crop, flip and RandAugment in training. False: use the resize of evaluation in training too.
    augment: bool = True
    # With `augment`: let pixel values outside 0 to 255 wrap around before RandAugment, as the reference does. False: clip them.
    wrap_uint8: bool = False
    # With `augment`: the host only decodes frames and cuts out the crop, and the devices resize and augment it. Side in pixels of the
    # square that the host sends for each frame: 4/3 of the shorter side of the stored frames, 342 for 256. 0: the host does it all.
    window: int = 0
    threads: int = 8  # Threads per host that read and decode; with `workers`, threads per worker process.
    workers: int = 0  # Processes per host that read and decode. 0: threads of the main process only.
    skip_corrupt: bool = False  # Mask out records whose checksum does not match instead of stopping the run.


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW, its learning rate schedule, and parameter groups."""

    lr: float = 1e-4  # Peak learning rate.
    min_lr: float = 1e-6  # Final learning rate; with schedule "bert", a lower bound.
    warmup: str = "2000 steps"  # Duration of the linear warm-up from 0 to `lr`, in steps, epochs or percent of the run.
    # Decay after the warm-up: "cosine" or "linear" from `lr` to `min_lr`; "bert": linear to 0 with steps counted from 1; "mplug2":
    # a cosine whose warm-up rises from `warmup_lr`.
    schedule: str = "cosine"
    warmup_lr: float = 0.0  # Learning rate of the first step; only schedule "mplug2" has one.
    weight_decay: float = 0.05  # Decoupled weight decay, multiplied by the learning rate.
    b1: float = 0.9  # Decay rate of Adam's first moment.
    b2: float = 0.999  # Decay rate of Adam's second moment.
    eps: float = 1e-6  # Constant added to the denominator of Adam's update.
    clip: float = 3.0  # Maximum global norm of the gradient of the trainable parameters.
    no_decay: tuple[str, ...] = ()  # Parameters without weight decay: regexes that match a whole parameter path.
    # Learning rate factors: (regex of a whole parameter path, factor). The first match applies; without a match it is 1.0.
    lr_scales: tuple[tuple[str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Shape of the device mesh, and which dimensions are sharded over which of its axes."""

    data: int = -1  # Size of the data-parallel axis. -1: all devices that the other two axes leave.
    fsdp: int = 1  # Size of the axis that shards both the batch and the parameters.
    tensor: int = 1  # Size of the axis that shards attention heads, MLP width and vocabulary.
    # Pairs (name of a parameter dimension, mesh axis that shards it). Dimensions without a pair are replicated.
    rules: tuple[tuple[str, str], ...] = (
        ("embed", "fsdp"),
        ("mlp", "tensor"),
        ("heads", "tensor"),
        ("kv_heads", "tensor"),
        ("vocab", "tensor"),
        ("queue", "fsdp"),
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """Length of a run, its initial parameters, evaluation and checkpoints. Durations: "50 steps", "2 epochs", "5%" of the run."""

    batch_size: int = 8  # Global batch: examples per optimizer step over all hosts.
    accumulate: int = 1  # Number of micro-batches per optimizer step; their gradients are accumulated.
    duration: str = "10 epochs"  # Length of the run, in steps or epochs.
    seed: int = 42  # Seed of the data order, augmentation, dropout and newly initialised parameters.
    log_every: str = "50 steps"  # Interval between log lines. A bare number counts steps.
    eval_every: str = "1 epochs"  # Interval between evaluations of the loss.
    eval_examples: int = 1024  # Evaluate at most this many examples, from the start of the split. 0: all of them.
    # Interval between evaluations of the task's scores (CIDEr, recall, accuracy) on the same examples. Empty: loss only.
    eval_scores_every: str = ""
    # Name of the score that selects the best checkpoint, kept in the folder `best` of the run. Empty: none is kept.
    best: str = ""
    save_every: str = "1 epochs"  # Interval between checkpoints.
    keep: int = 3  # Number of checkpoints kept; older ones are deleted.
    max_bad_steps: int = 20  # Stop after this many consecutive steps with a non-finite loss or gradient.
    # Runs or conversions to initialise from: "DIR" (all parameters), "llm=DIR,vision=DIR" (subtrees) or "NAME:STORED=DIR".
    init_from: str = ""
    other_tokenizer: bool = False  # Accept parameters from `init_from` that were trained with another tokenizer.
    frozen: tuple[str, ...] | None = None  # Frozen parameters: regexes of whole paths. None: the task's default.
    # Keep the logits for the backward pass instead of rematerialising them: faster, but needs more memory.
    keep_logits: bool = False
    # Precision of frozen parameters: float32, bfloat16, float16 or int8. "int8" quantises stacked matrices in device memory; checkpoints keep bfloat16.
    frozen_dtype: str = "bfloat16"
    # Layers that one pass of a loop over layers computes. 0: all on an NVIDIA GPU, which is faster and compiles longer, elsewhere one.
    unroll: int = 0
    fused_kernels: bool = True  # Use fused attention kernels on TPU and NVIDIA GPU. False: plain XLA attention.

    def __post_init__(self) -> None:
        every = str(self.log_every).strip()  # runs of older versions stored a number of steps
        if every.isdecimal():
            object.__setattr__(self, "log_every", f"{int(every)} steps")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """All settings of a run."""

    task: str  # Name of the task, one of ymplug_jax/tasks/names.py.
    # Settings of the model: a Flax module of ymplug_jax/models in a config file, its fields as a dict afterwards.
    model: Model
    data: Data = Data()  # Settings of the data.
    optim: Optim = Optim()  # Settings of the optimizer.
    mesh: Mesh = Mesh()  # Settings of the device mesh.
    train: Train = Train()  # Settings of the training loop.
    # Settings of the task: the dataclass `Options` of its module in a config file, its fields as a dict afterwards.
    options: object = dataclasses.field(default_factory=dict)


def settings_of(value: Any) -> Any:
    """Convert nested dataclasses (Flax modules included) to nested plain dicts.

    A class with a class variable `kind` is one of several alternatives; its dict begins with the key "kind".
    """
    if dataclasses.is_dataclass(value):
        fields = (f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name"))
        kind = getattr(type(value), "kind", None)
        first = {} if kind is None else {"kind": kind}
        return first | {name: settings_of(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {name: settings_of(part) for name, part in value.items()}
    return value


NAMES = {bool: "true or false; write True or False", int: "a whole number; give an integer such as 8",
         float: "a number; give one such as 0.5", str: "a string; write it in quotes"}  # fmt: skip
# Minimum values. Anything smaller would fail late in the run or train nothing.
LEAST: Mapping[str, Mapping[str, float]] = {
    "config.data": {"examples": 0, "frames": 1, "image_size": 1, "max_tokens": 2, "max_words": 1, "threads": 1, "workers": 0},
    "config.optim": {"lr": 0, "min_lr": 0, "weight_decay": 0, "eps": 1e-30, "clip": 1e-30},
    "config.mesh": {"data": -1, "fsdp": 1, "tensor": 1},
    "config.train": {
        "batch_size": 1, "accumulate": 1, "seed": 0, "eval_examples": 0, "keep": 1, "max_bad_steps": 1,
        "unroll": 0,
    },
}  # fmt: skip
# Maximum values; b1 and b2 must be strictly smaller.
MOST: Mapping[str, Mapping[str, float]] = {
    "config.optim": {"b1": 1, "b2": 1},
    "config.train": {"seed": 2**32 - 1},
}


def to_config_dict(experiment: Experiment) -> "ConfigDict":
    """Convert an experiment to a locked ConfigDict, for command-line overrides."""
    from ml_collections import ConfigDict, config_dict  # imported here: the benchmarks run without it

    made = ConfigDict(settings_of(experiment), convert_dict=True)
    if made.train.frozen is None:  # ConfigDict infers a type from the value, and None has none
        made.train.frozen = config_dict.placeholder(tuple)
    return made.lock()


def from_config_dict(config: "ConfigDict | Mapping[str, Any]") -> Experiment:
    """Build an Experiment from a (possibly overridden) ConfigDict. An int given for a float setting becomes a float.

    Raises:
      Mistake: an unknown key, or a value of the wrong type or out of range; the message names the setting.
    """
    plain = dict(config) if isinstance(config, Mapping) else config.to_dict()
    parts = {"data": Data, "optim": Optim, "mesh": Mesh, "train": Train}
    for key, cls in parts.items():
        plain[key] = build(cls, plain.get(key, {}), f"config.{key}")
    if isinstance(plain.get("model"), Mapping):
        plain["model"] = with_kinds(plain["model"])
    return build(Experiment, plain, "config")


def with_kinds(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's settings with `llm.kind` filled in. Runs stored without a kind have a GPT-3."""
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
    """Build a dataclass of settings from a dict of its fields.

    Args:
      cls: the dataclass.
      values: field name -> value.
      where: name of the group in messages, e.g. "config.train".
      least: minimum values by field name. None: those of LEAST.
      most: maximum values by field name. None: those of MOST.

    Raises:
      Mistake: `values` is not a dict, or a field is unknown, missing, of the wrong type or out of range; the message names
        the setting.
    """
    lows: Mapping[str, float] = LEAST.get(where, {}) if least is None else least
    highs: Mapping[str, float] = MOST.get(where, {}) if most is None else most
    if not isinstance(values, Mapping):
        raise Mistake(f"{where}: {values!r} is not a group of settings; set each one as {where}.NAME")
    hints = get_type_hints(cls)
    for name in values:
        if name not in hints:
            raise Mistake(unknown(name, hints, where))
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if needed and field.name not in values:
            raise Mistake(f"{where}.{field.name}: missing; give it a value")
    hints |= {"log_every": int | str} if cls is Train else {}  # older versions stored a number of steps
    made = {name: checked(value, hints[name], f"{where}.{name}") for name, value in values.items()}
    for name, low in lows.items():
        if made.get(name, low) < low:
            below = "give more than 0" if 0 < low < 1 else f"give {low} or more"
            raise Mistake(f"{where}.{name}: {made[name]!r} is too small; {below}")
    for name, high in highs.items():
        beta = name in ("b1", "b2")
        if name in made and (made[name] > high or (beta and not 0 <= made[name] < high)):
            raise Mistake(
                f"{where}.{name}: {made[name]!r} is out of range; give {'less than' if beta else 'at most'} {high}"
            )
    return cls(**made)


def unknown(name: str, known: Iterable[str], where: str) -> str:
    """Return the message for an unknown setting: it suggests the closest name, or lists all names."""
    near = difflib.get_close_matches(name, known := sorted(known), 1)
    names = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known) or '(none)'}"
    return f"{where}: unknown setting {name!r}; {names}"


def checked(value: Any, kind: Any, where: str) -> Any:
    """Return the value of a setting converted to its annotation: lists become tuples, ints become floats.

    Args:
      value: from the command line, a config file or JSON.
      kind: the annotation: bool, int, float, str, a tuple of these, or a union with None. Any other accepts every value.
      where: name of the setting in messages.

    Raises:
      Mistake: the value has the wrong type, or is a float that is not finite.
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
            raise Mistake(f"{where}: {value!r} is not a list; write ('a', 'b')")
        parts = get_args(kind)
        each = (parts[0],) * len(value) if parts[-1] is ... else parts
        if len(each) != len(value):
            raise Mistake(f"{where}: {value!r} has {len(value)} elements; give {len(each)}")
        return tuple(checked(part, one, where) for part, one in zip(value, each, strict=True))
    if kind in NAMES:
        allowed = (int, float) if kind is float else kind
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            raise Mistake(f"{where}: {value!r} is not {NAMES[kind]}")
        if kind is float and not math.isfinite(value):
            raise Mistake(f"{where}: {value!r} is not finite; give a finite number")
        return float(value) if kind is float else value
    return _as_tuples(value)


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def to_json(experiment: Experiment) -> str:
    """Return the resolved settings as indented JSON, the content of `config.json` in a run's folder."""
    return json.dumps(settings_of(experiment), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> Experiment:
    """Parse the output of `to_json`.

    Raises:
      ValueError: the text is not JSON, or not a valid set of settings.
    """
    read = json.loads(text)
    if not isinstance(read, dict):
        raise Mistake("holds no settings; expected a JSON object")
    return from_config_dict(read)
