"""Options of a task: the frozen dataclass `Options` beside its `make`, and what the programs read from its fields.

An option that names a file, has limits, or does not matter to `predict` says so where it is declared:

    @dataclasses.dataclass(frozen=True)
    class Options:
        best: int = option(32, least=0)
        candidates: str = option("", file=True, arrays=("video", "text"), predict=False)
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from ymplug_jax.core import config
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.tasks.names import module_of, modules

T = TypeVar("T")
WHERE = "config.options"
# Every task had these in its settings before each had its own. A config.json of that time is read without those that are not its task's.
ONCE_SHARED = frozenset((
    "prompt", "search", "beams", "prompt_tokens", "new_tokens", "top_k", "top_p", "temperature", "reference_negatives", "candidates",
    "best", "group", "masked_share", "entities", "reference_entities", "prompts", "answers",
))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NoOptions:
    """Of a task that declares none."""


class File(NamedTuple):
    """An option that names a file."""

    name: str
    value: str
    arrays: tuple[str, ...]  # that it must hold, where it is one of numpy's


def option(
    default: T,
    *,
    least: float | None = None,
    most: float | None = None,
    file: bool = False,
    arrays: tuple[str, ...] = (),
    predict: bool = True,
) -> T:
    """A field of `Options`.

    Args:
      default: its value where none is given; the type of later values is that of the annotation.
      least: the smallest value; one below 1 and above 0 stands for "above 0".
      most: the largest value.
      file: whether it names a file, empty for none.
      arrays: of numpy that the file must hold.
      predict: whether the answers of `ymplug_jax.predict` depend on it; if not, they are computed with the default.
    """
    facts = {"least": least, "most": most, "file": file, "arrays": arrays, "predict": predict}
    return dataclasses.field(default=default, metadata=facts)


def class_of(task: str) -> type:
    """The dataclass of a task's options."""
    found = getattr(module_of(task), "Options", NoOptions)
    assert isinstance(found, type)
    return found


def build(cls: type[T], given: object) -> T:
    """A task's options from the settings: an instance, or its fields by name.

    Raises:
      Mistake: an option that the task does not have, a value of another type or out of range; the message names it.
    """
    if dataclasses.is_dataclass(given) and not isinstance(given, cls):
        raise Mistake(f"{WHERE}: options of another task ({type(given).__module__}); give those of config.task")
    fields = {field.name: field.metadata for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    least = {name: facts["least"] for name, facts in fields.items() if facts.get("least") is not None}
    most = {name: facts["most"] for name, facts in fields.items() if facts.get("most") is not None}
    plain = config.settings_of(given) if isinstance(given, cls) else given
    return config.build(cls, plain, WHERE, least=least, most=most)


def completed(experiment: Experiment, *, stored: bool = False) -> Experiment:
    """The experiment with all options of its task as a dict, checked.

    Args:
      experiment: whose options may be a dataclass, or a dict of some of them.
      stored: from the config.json of a run, which may be older than `Options` of the tasks.

    Raises:
      Mistake: no such task, or options that it does not have.
    """
    cls, given = class_of(experiment.task), experiment.options
    if stored and isinstance(given, Mapping):
        own = {field.name for field in dataclasses.fields(cls)}
        given = {name: value for name, value in given.items() if name in own or name not in ONCE_SHARED}
    return dataclasses.replace(experiment, options=config.settings_of(build(cls, given)))


def complete(settings: ConfigDict) -> ConfigDict:
    """The locked settings with all options of their task, so that each can be set on the command line; `settings` is changed."""
    if settings.get("task") not in modules():
        return settings  # said by whoever makes the task
    own = class_of(settings.task)()
    given = settings.get("options", ConfigDict()).to_dict()
    with settings.unlocked():
        settings.options = ConfigDict(config.settings_of(own) | given)
    return settings


def files(experiment: Experiment) -> list[File]:
    """The options that name files, those that are empty left out."""
    options: object = build(class_of(experiment.task), experiment.options)
    found = [
        File(field.name, str(getattr(options, field.name)), tuple(field.metadata["arrays"]))
        for field in dataclasses.fields(class_of(experiment.task))
        if field.metadata.get("file")
    ]
    return [file for file in found if file.value]


def with_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """The experiment with some of its options replaced."""
    options: object = build(class_of(experiment.task), experiment.options)
    return dataclasses.replace(experiment, options=config.settings_of(options) | dict(values))


def for_predict(experiment: Experiment) -> Experiment:
    """The experiment with the default in every option that does not matter to `predict`."""
    fields = dataclasses.fields(class_of(experiment.task))
    return with_values(
        experiment, {field.name: field.default for field in fields if not field.metadata.get("predict", True)}
    )
