"""The `Task` record: the functions that bind a model to data. `names.py` maps the names in configs to tasks.

A task module defines `make`, which builds the record, and optionally `Options` (its settings, see options.py), `SCORES` (every score
that its evaluation may report, see presentation.py) and `ANSWERS` (the commands of `ymplug_jax.predict` that its runs support).
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
from ymplug_jax.data.packing import Size
from ymplug_jax.data.records import Record, Split
from ymplug_jax.models import language_models, layers
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.tasks import names
from ymplug_jax.tasks.carried import Carried, Rows
from ymplug_jax.tasks.kept_rows import KeptRows
from ymplug_jax.tasks.presentation import Describe, Page, Score

Batch = dict[str, jax.Array]  # fixed shapes with leading axis B; always contains valid: bool[B]
Example = dict[str, np.ndarray]

# Kinds of shards by the text of their records. All records have frames.
TITLED = ("pretrain", "classification", "question")  # records with a title; for "question" it is the question
CAPTIONED = ("captioning", "retrieval")  # records with captions

Resize = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # (stored value, required shape) -> value
Row = dict[str, np.ndarray]  # predictions of one example, without B; "index" is its position in the split


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of an evaluation."""

    scores: dict[str, Any]  # written to scores.json
    rows: list[dict[str, Any]]  # one readable row per example, written to predictions.jsonl
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # written to index.npz unless empty


@dataclasses.dataclass(frozen=True)
class Task:
    """The functions and properties of one task on one model that training, evaluation and prediction use."""

    kinds: tuple[str, ...]  # kinds of shards (schema.COLUMNS) that `example` can read; "text" is a text file
    axes: AxisRules  # partition rules of the parameters: AXES of the model module
    frozen: tuple[str, ...]  # regexes that match whole paths of frozen parameters
    init: Callable[[jax.Array], Params]  # key -> initial parameters, float32
    # (record, rng; None in evaluation) -> arrays of fixed shape. With `measure`, the first argument is a sequence of records, which
    # are packed into one example; in evaluation it holds exactly one.
    example: Callable[[Any, np.random.Generator | None], Example]
    spec: Mapping[str, jax.ShapeDtypeStruct]  # shapes and dtypes of one training example, without B and `valid`
    # (params, batch, key; None in evaluation) -> (scalar loss, metrics); micro-batches are weighted by metrics["loss"].weight
    loss: Callable[[Params, Batch, jax.Array | None], tuple[jax.Array, Metrics]]
    predict: Callable[[Params, Batch], dict[str, jax.Array]] | None = None  # arrays with leading axis B
    # Shapes and dtypes of the arrays that an example has in evaluation only, without B.
    asked_spec: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
    # Second model pass for scoring pairs: (params, rows, kept predictions) -> rows, the same on every host. None: not needed.
    rescore: Callable[[Params, list[Row], KeptRows], list[Row]] | None = None
    kept: tuple[str, ...] = ()  # predictions that stay on the devices for `rescore`, too large to gather to hosts
    score: Callable[[list[Row], Split], Report] | None = None  # (rows, records of the split, or views[""]) -> report
    # Record -> (number of tokens of the texts that an evaluation reads, how many of them fit). None: the task does not tell.
    lengths: Callable[[Record], tuple[int, int]] | None = None
    # Raises Mistake for a record that `score` could not score. Checked for some records before a run starts. None: no such record.
    scorable: Callable[[Record], None] | None = None
    # Split -> the splits that evaluation predicts: "" is the split as it is evaluated, all others are the same examples with
    # changed media, for control runs. Their predictions reach `score` as "KEY/NAME" in the rows of "". None: the split alone.
    views: Callable[[Split], Mapping[str, Split]] | None = None
    scores: tuple[Score, ...] = ()  # scores that an evaluation may report, in display order
    page: Page = dataclasses.field(default_factory=Page)  # how the report shows the readable rows
    describe: Mapping[str, Describe] = dataclasses.field(default_factory=dict)  # command of `predict` -> its answer
    # Training split -> text before the first turn of its conversations, kept in the run's folder for `predict chat`. None: no such text.
    introduction: Callable[[Split], str] | None = None
    chats: bool = False  # the model is an `MPLUGChat`, with which `predict chat` holds conversations
    embeds: bool = False  # "video" and "text" of a row are unit vectors, f32[E], which `predict retrieve` ranks
    fresh: tuple[str, ...] = ()  # path regexes that may be missing from `init_from`, e.g. new heads
    # path -> how to resize a stored table of another size
    resize: Mapping[str, Resize] = dataclasses.field(default_factory=dict)
    # path -> (low, high) that a trained parameter is clipped to after each update
    bounds: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    # Size of a record in an example; 0 tokens: it has no target and is never drawn. None: no packing. Comes with `room`.
    measure: Callable[[Record], Size] | None = None
    room: Size | None = None  # capacity of an example
    apart: bool = False  # with several folders, every batch of training comes from one of them
    carried: Carried | None = (
        None  # state beside the parameters, such as a momentum teacher, with a training loss of its own
    )

    def one(self, record: Record, rng: np.random.Generator | None) -> Example:
        """Return the example of a single record."""
        return self.example((record,) if self.measure else record, rng)

    def training_loss(
        self, params: Params, carried: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, Metrics, Rows]:
        """Return (scalar loss, metrics, rows for `Carried.update`) of a training batch; without `carried` there are no rows."""
        if self.carried is None:
            return *self.loss(params, batch, key), {}
        return self.carried.loss(params, carried, batch, key)

    def score_named(self, name: str) -> Score:
        """The score that `config.train.best` names.

        Raises:
          Mistake: The task has no such score, or it is that of a control; the message suggests the closest name or lists all.
        """
        found = next((score for score in self.scores if score.name == name), None)
        known = [score.name for score in self.scores if score.higher_is_better is not None]
        if found is not None and found.higher_is_better is None:
            raise Mistake(
                f"config.train.best: neither a high nor a low {name!r} is better; choose one of {', '.join(known)}"
            )
        if found is None:
            near = difflib.get_close_matches(name, known, 1)
            raise Mistake(
                f"config.train.best: unknown score {name!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}")
            )
        return found


DTYPES = ("float32", "bfloat16", "float16")  # compute dtypes of models
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
    """Make the task of an experiment, with its model.

    Raises:
      Mistake: The task does not exist, or a setting of its model or options is invalid.
    """
    made = names.module_of(experiment.task).make(experiment)
    assert isinstance(made, Task)
    return made


def build(cls: type[nn.Module], settings: Any, where: str = "config.model") -> Any:
    """Build a linen module from nested settings: the module's fields are its settings.

    Raises:
      Mistake: A setting is unknown or has the wrong type or size; the message names it.
    """
    if isinstance(settings, cls):
        return settings
    if not isinstance(settings, Mapping):
        raise Mistake(f"{where}: {settings!r} is not a mapping; give the fields of {cls.__name__} by name")
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
    """Build the language model whose class is named by the setting "kind".

    Raises:
      Mistake: The kind is missing or unknown, or `build` raises it.
    """
    if isinstance(settings, LanguageModel):
        return settings
    if not isinstance(settings, Mapping):
        raise Mistake(f"{where}: {settings!r} is not a mapping; give kind and the fields of that language model")
    kinds, kind = language_models.KINDS, settings.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise Mistake(f"{where}.kind: unknown kind {kind!r}; choose one of {', '.join(kinds)}")
    return build(kinds[kind], {name: value for name, value in settings.items() if name != "kind"}, where)


def _check_sizes(module: nn.Module, where: str) -> None:
    """Check the sizes, rates and dtypes of a module. Integers not in SIZES may be 0, which disables a part.

    Raises:
      Mistake: A value is out of range; the message names the setting.
    """
    for field in dataclasses.fields(module):
        value, name = getattr(module, field.name), f"{where}.{field.name}"
        if field.name in ("parent", "name"):
            continue
        if field.name == "dtype" and value not in DTYPES:
            raise Mistake(f"{name}: unknown dtype {value!r}; choose one of {', '.join(DTYPES)}")
        if field.name == "remat" and value not in ("none", *layers.REMAT):
            raise Mistake(f"{name}: unknown remat policy {value!r}; choose one of none, {', '.join(layers.REMAT)}")
        if field.name in SHARES and not 0 <= value < 1:
            raise Mistake(f"{name}: {value!r} is out of range; give 0 or more and less than 1")
        if field.name in ABOVE_ZERO and value <= 0:
            raise Mistake(f"{name}: {value!r} is too small; give more than 0")
        if type(value) is int and value < (least := int(field.name in SIZES)):
            raise Mistake(f"{name}: {value} is too small; give {least} or more")
    heads, width, kv_heads = getattr(module, "heads", 1), getattr(module, "width", None), getattr(module, "kv_heads", 1)
    if heads % kv_heads:
        raise Mistake(f"{where}.kv_heads: {kv_heads} does not divide {heads} heads; choose a divisor of {where}.heads")
    if getattr(module, "head_dim", 2) % 2:
        raise Mistake(f"{where}.head_dim: {module.head_dim} is odd; give an even number, as rotary positions need")
    if width is not None and not hasattr(module, "head_dim") and width % heads:
        raise Mistake(f"{where}.width: {width} is not divisible by {heads} heads; choose a multiple of {where}.heads")
