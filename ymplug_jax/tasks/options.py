"""Task options: the frozen dataclass `Options` beside a task's `make`, read and checked from `config.options`.

`option` declares limits, file names and whether `predict` uses a value:

    @dataclasses.dataclass(frozen=True)
    class Options:
        best: int = option(32, least=0)
        candidates: str = option("", file=True, arrays=("video", "text"), predict=False)
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ymplug_jax.core import config
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.tasks.names import module_of, modules

if TYPE_CHECKING:
    from ml_collections import ConfigDict

T = TypeVar("T")
WHERE = "config.options"
# Older versions wrote these options into the config.json of every task; the ones that a task does not have are ignored when it is read.
ONCE_SHARED = frozenset((
    "prompt", "search", "beams", "prompt_tokens", "new_tokens", "top_k", "top_p", "temperature", "reference_negatives", "candidates",
    "best", "group", "masked_share", "entities", "reference_entities", "prompts", "answers",
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Options of a task that declares none."""


class File(NamedTuple):
    """An option that names a file."""

    name: str
    value: str
    arrays: tuple[str, ...]  # arrays that it must hold if it is an .npz file


def option(
    default: T,
    *,
    least: float | None = None,
    most: float | None = None,
    file: bool = False,
    arrays: tuple[str, ...] = (),
    predict: bool = True,
) -> T:
    """Declare a field of `Options`.

    Args:
      default: Default value. The field's annotation is the type that given values are checked against.
      least: Smallest allowed value; a value between 0 and 1 means "above 0".
      most: Largest allowed value.
      file: Whether the value names a file; the empty string means no file.
      arrays: Names of the arrays that the .npz file must hold.
      predict: Whether `ymplug_jax.predict` depends on the option; if not, it uses the default.
    """
    facts = {"least": least, "most": most, "file": file, "arrays": arrays, "predict": predict}
    return dataclasses.field(default=default, metadata=facts)


def class_of(task: str) -> type:
    """The `Options` dataclass of a task, `NoOptions` if it declares none."""
    found = getattr(module_of(task), "Options", NoOptions)
    assert isinstance(found, type)
    return found


def build(cls: type[T], given: object) -> T:
    """Build a task's options from an instance or from a mapping of field names to values.

    Raises:
      Mistake: An option is unknown, has the wrong type or is out of range; the message names it.
    """
    if dataclasses.is_dataclass(given) and not isinstance(given, cls):
        raise Mistake(f"{WHERE}: options of another task ({type(given).__module__}); give the options of config.task")
    fields = {field.name: field.metadata for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    least = {name: facts["least"] for name, facts in fields.items() if facts.get("least") is not None}
    most = {name: facts["most"] for name, facts in fields.items() if facts.get("most") is not None}
    plain = config.settings_of(given) if isinstance(given, cls) else given
    return config.build(cls, plain, WHERE, least=least, most=most)


def completed(experiment: Experiment, *, stored: bool = False) -> Experiment:
    """The experiment with its options checked and completed, as a dict.

    Args:
      experiment: Its options may be a dataclass, or a dict of some of the fields.
      stored: Whether the options come from a run's config.json, which an older version may have written.

    Raises:
      Mistake: The task does not exist or does not have one of the options.
    """
    cls, given = class_of(experiment.task), experiment.options
    if stored and isinstance(given, Mapping):
        own = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in given.items() if name in own or name not in ONCE_SHARED}
    return dataclasses.replace(experiment, options=config.settings_of(build(cls, given)))


def complete(settings: "ConfigDict") -> "ConfigDict":
    """Add all options of the task to `settings`, in place, so that each one is a command-line flag."""
    if settings.get("task") not in modules():
        return settings  # the unknown name is reported when the task is made
    from ml_collections import ConfigDict  # imported here: the benchmarks run without it

    own = class_of(settings.task)()
    given = settings.get("options", ConfigDict()).to_dict()
    with settings.unlocked():
        settings.options = ConfigDict(config.settings_of(own) | given)
    return settings


def files(experiment: Experiment) -> list[File]:
    """The non-empty options that name files."""
    options: object = build(class_of(experiment.task), experiment.options)
    found = [
        File(field.name, str(getattr(options, field.name)), tuple(field.metadata["arrays"]))
        for field in dataclasses.fields(class_of(experiment.task))
        if field.metadata.get("file")
    ]
    return [file for file in found if file.value]


def with_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The experiment with the given options replaced."""
    options: object = build(class_of(experiment.task), experiment.options)
    return dataclasses.replace(experiment, options=config.settings_of(options) | dict(values))


def for_predict(experiment: Experiment) -> Experiment:
    """The experiment with every option that `predict` does not use reset to its default."""
    fields = dataclasses.fields(class_of(experiment.task))
    return with_values(
        experiment, {field.name: field.default for field in fields if not field.metadata.get("predict", True)}
    )
