"""What a task is: one record of functions that binds a model to data. `names.py` says how a task is called in a config.

A task's file holds `make`, which builds the record; and where there are any, `Options` (its settings, see options.py), `SCORES` (all
that its evaluations may have, see presentation.py) and `ANSWERS` (the commands of `ymplug_jax.predict` that its runs answer).
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import flax.linen as nn
import jax
import numpy as np

from ymplug_jax.core import config
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Metrics
from ymplug_jax.core.sharding import AxisRules
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record, Split
from ymplug_jax.models import language_models, layers
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.tasks import names
from ymplug_jax.tasks.kept_rows import KeptRows
from ymplug_jax.tasks.presentation import Describe, Page, Score

Batch = dict[str, jax.Array]  # fixed shapes, leading axis B, always has valid: bool[B]
Example = dict[str, np.ndarray]

# Kinds of shards by what their records have. All have frames.
TITLED = ("pretrain", "classification", "question")  # a title; of questions it is the question
CAPTIONED = ("captioning", "retrieval")  # captions

Resize = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (stored value, wanted shape) -> value
Row = dict[str, np.ndarray]  # one example's predictions, without B; "index" is its place in the split


@dataclasses.dataclass(frozen=True)
class Report:
    """What an evaluation found."""

    scores: dict[str, Any]  # written to scores.json
    rows: list[dict[str, Any]]  # readable, one an example, written to predictions.jsonl
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # written to index.npz if there are any


@dataclasses.dataclass(frozen=True)
class Task:
    """One task on one model: everything that the programs (train, evaluate, predict) need to know about either."""

    kinds: tuple[str, ...]  # of shards (schema.COLUMNS) whose columns are what `example` reads; "text" is a text file
    axes: AxisRules  # AXES of the model file
    frozen: tuple[str, ...]  # path regexes, full match
    init: Callable[[jax.Array], Params]  # key -> fresh parameters, float32
    example: Callable[
        [Record, np.random.Generator | None], Example
    ]  # (record, rng or None for evaluation) -> fixed-shape arrays
    spec: Mapping[str, jax.ShapeDtypeStruct]  # one training example, without B and without valid
    # (params, batch, key or None for evaluation) -> (scalar loss, metrics); metrics["loss"].weight weighs micro-batches
    loss: Callable[[Params, Batch, jax.Array | None], tuple[jax.Array, Metrics]]
    predict: Callable[[Params, Batch], dict[str, jax.Array]] | None = None  # arrays with leading axis B
    # Where scoring needs the model once more (all pairs): (params, rows, kept predictions) -> rows, on every host alike.
    rescore: Callable[[Params, list[Row], KeptRows], list[Row]] | None = None
    kept: tuple[str, ...] = ()  # predictions too large for every host: they stay on the devices, for `rescore` alone
    score: Callable[[list[Row], Split], Report] | None = None  # (rows, records of the split)
    scores: tuple[Score, ...] = ()  # that an evaluation may have, in the order in which they are shown
    page: Page = dataclasses.field(default_factory=Page)  # how the report shows the readable rows
    describe: Mapping[str, Describe] = dataclasses.field(default_factory=dict)  # command of `predict` -> its answer
    embeds: bool = False  # "video" and "text" of a row are unit vectors, f32[E], which `predict retrieve` ranks
    fresh: tuple[str, ...] = ()  # path regexes that `init_from` may lack: heads that this task adds
    resize: Mapping[str, Resize] = dataclasses.field(
        default_factory=dict
    )  # path -> how a stored table of another size becomes ours
    bounds: Mapping[str, tuple[float, float]] = dataclasses.field(
        default_factory=dict
    )  # path -> limits that a trained value is cut to after each update

    def score_named(self, name: str) -> Score:
        """The score that `config.train.best` names.

        Raises:
          Mistake: the task has no such score; the message names the nearest one, or all.
        """
        found = next((score for score in self.scores if score.name == name), None)
        if found is None:
            known = [score.name for score in self.scores]
            near = difflib.get_close_matches(name, known, 1)
            raise Mistake(
                f"config.train.best: this task has no score {name!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}")
            )
        return found


DTYPES = ("float32", "bfloat16", "float16")  # that models compute in
SHARES = ("dropout", "drop_path")
ABOVE_ZERO = ("mlp_ratio", "ln_eps", "norm_eps", "rope_theta")
SIZES = (
    "vocab",
    "width",
    "depth",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "hidden",
    "max_positions",
    "types",
    "image_size",
    "patch_size",
    "frames",
    "queries",
)


def get(experiment: Experiment) -> Task:
    """The task that the experiment names, with its model.

    Raises:
      Mistake: no such task, or a setting that its model or its options do not have.
    """
    made = names.module_of(experiment.task).make(experiment)
    assert isinstance(made, Task)
    return made


def build(cls: type[nn.Module], settings: Any, where: str = "config.model") -> Any:
    """A linen module from nested settings: the fields of a module are its settings.

    Raises:
      Mistake: a setting that the module does not have, or a value of another type; the message names it.
    """
    if isinstance(settings, cls):
        return settings
    if not isinstance(settings, Mapping):
        raise Mistake(f"{where}: {settings!r} are no settings of {cls.__name__}")
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)} - {"parent", "name"}
    for given in settings:
        if given not in known:
            raise Mistake(config.unknown(given, known, where))

    def value(key: str) -> Any:
        kind = hints[key]
        if kind is LanguageModel:
            return _decoder(settings[key], f"{where}.{key}")
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return build(kind, settings[key], f"{where}.{key}")
        return config.checked(settings[key], kind, f"{where}.{key}")

    made = cls(**{key: value(key) for key in settings})
    _check_sizes(made, where)
    return made


def _decoder(settings: Any, where: str) -> LanguageModel:
    """A language model from its settings, of which "kind" names its class.

    Raises:
      Mistake: no kind, an unknown one, or what `build` raises.
    """
    if isinstance(settings, LanguageModel):
        return settings
    if not isinstance(settings, Mapping):
        raise Mistake(f"{where}: {settings!r} are no settings of a language model")
    kinds, kind = language_models.KINDS, settings.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise Mistake(f"{where}.kind is {kind!r}; there are {', '.join(kinds)}")
    return build(kinds[kind], {name: value for name, value in settings.items() if name != "kind"}, where)


def _check_sizes(module: nn.Module, where: str) -> None:
    """Whether a module can have these sizes. A number that is none of SIZES may be 0, which leaves a part out.

    Raises:
      Mistake: a size, a share or a dtype that cannot be; the message names the setting.
    """
    for field in dataclasses.fields(module):
        value, name = getattr(module, field.name), f"{where}.{field.name}"
        if field.name in ("parent", "name"):
            continue
        if field.name == "dtype" and value not in DTYPES:
            raise Mistake(f"{name} is {value!r}; there are {', '.join(DTYPES)}")
        if field.name == "remat" and value not in ("none", *layers.REMAT):
            raise Mistake(f"{name} is {value!r}; there are none, {', '.join(layers.REMAT)}")
        if field.name in SHARES and not 0 <= value < 1:
            raise Mistake(f"{name}: {value!r} is no share; give 0 or more, and less than 1")
        if field.name in ABOVE_ZERO and value <= 0:
            raise Mistake(f"{name}: {value!r} is too small; it must be above 0")
        if type(value) is int and value < (least := int(field.name in SIZES)):
            raise Mistake(f"{name}: {value} is too small; give {least} or more")
    heads, width, kv_heads = getattr(module, "heads", 1), getattr(module, "width", None), getattr(module, "kv_heads", 1)
    if heads % kv_heads:
        raise Mistake(f"{where}.kv_heads: {heads} heads cannot share {kv_heads}; choose a divisor of {where}.heads")
    if getattr(module, "head_dim", 2) % 2:
        raise Mistake(f"{where}.head_dim: {module.head_dim} is odd; rotary positions need an even number")
    if width is not None and not hasattr(module, "head_dim") and width % heads:
        raise Mistake(f"{where}.width: {width} cannot be cut into {heads} heads; choose a multiple of {where}.heads")
