"""All settings of a run as nested frozen dataclasses, and their way in: Python file -> locked ConfigDict -> Experiment.

A config file builds an `Experiment`, hands it to `to_config_dict`, and returns the result. The ConfigDict is made from
the dataclasses and locked, so a misspelt key or a wrong type on the command line fails on its own line. Past `main.py`,
code takes only the dataclass it needs.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Data:
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
    threads: int = 8  # threads that read and decode, per host
    workers: int = 0  # processes that read and decode, per host; 0: threads alone
    skip_corrupt: bool = False  # count records with a broken checksum as invalid instead of stopping


@dataclasses.dataclass(frozen=True)
class Optim:
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
    data: int = -1  # replicas; -1: all devices that the other axes leave
    fsdp: int = 1  # parameters and batch are both cut along this axis
    tensor: int = 1  # heads, mlp width and vocabulary are cut along this axis
    # Axis word of a parameter -> mesh axis. Words that are not named stay whole.
    rules: tuple[tuple[str, str], ...] = (
        ("embed", "fsdp"),
        ("mlp", "tensor"),
        ("heads", "tensor"),
        ("vocab", "tensor"),
    )


@dataclasses.dataclass(frozen=True)
class Train:
    batch_size: int = 8  # examples a step, over all hosts
    accumulate: int = 1  # micro-batches that one step is cut into
    duration: str = "10 epochs"
    seed: int = 42
    log_every: str = "50 steps"  # a bare number counts steps
    eval_every: str = "1 epochs"
    eval_examples: int = 1024  # at most, from the head of the evaluation split
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

    def __post_init__(self):
        every = self.log_every  # was a number of steps once: configs, command lines and runs of that time still hold it
        if (
            isinstance(every, int)
            and not isinstance(every, bool)
            or isinstance(every, str)
            and every.strip().isdecimal()
        ):
            object.__setattr__(self, "log_every", f"{int(every)} steps")


@dataclasses.dataclass(frozen=True)
class Options:
    """What single tasks ask for beyond the rest."""

    prompt: str = ""  # caption: text between the start token and the caption
    search: str = "beam"  # caption: "beam" (the reference's rule), "beam_by_length", "greedy" or "sample"
    beams: int = 5
    prompt_tokens: int = 20  # caption: width of the prompt's row in generation; the reference's rule divides by it
    new_tokens: int = 100  # caption: at most so many
    top_k: int = 5  # caption, search "sample": among so many; 0: see top_p
    top_p: float = 0.0
    temperature: float = 1.0
    # match: permute titles as well as videos; alpro: negatives may be other rows of the same clip; both as the reference did
    reference_negatives: bool = False
    candidates: str = ""  # match: index.npz of a retrieval run's evaluation, whose best pairs are scored; "": all pairs
    best: int = 32  # match: pairs of each video and each title that are taken from it; alpro_retrieve: 0 for all pairs
    # alpro, match: rows of a batch that share negatives, the reference's batch of one device; 0: all of them
    group: int = 0
    masked_share: float = 0.15  # alpro_pretrain: words to be told
    entities: str = ""  # alpro_pretrain: index.npz of a prompter's evaluation, the teacher's table of entities
    reference_entities: bool = (
        False  # alpro_pretrain: leave rows out by the number of their best entity, as the reference did
    )
    prompts: str = ""  # alpro_prompter: file of entity prompts that data_prep.entity_prompts wrote
    answers: str = ""  # alpro_classify: the possible answers, one a line; "": the 45 categories


@dataclasses.dataclass(frozen=True)
class Experiment:
    task: str  # a file of ymplug_jax/tasks
    model: Any  # fields of the task's model, see ymplug_jax/models; a linen module in a config file, a dict afterwards
    data: Data = Data()
    optim: Optim = Optim()
    mesh: Mesh = Mesh()
    train: Train = Train()
    options: Options = Options()


def settings_of(value: Any) -> Any:
    """Nested dataclasses (linen modules included) as nested plain dicts."""
    if dataclasses.is_dataclass(value):
        fields = (f.name for f in dataclasses.fields(value) if f.name not in ("parent", "name"))
        return {name: settings_of(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {name: settings_of(part) for name, part in value.items()}
    return value


def to_config_dict(experiment: Experiment) -> ConfigDict:
    """Locked ConfigDict with every setting of the experiment, for command-line overrides."""
    return ConfigDict(settings_of(experiment), convert_dict=True).lock()


def from_config_dict(config: ConfigDict | Mapping) -> Experiment:
    """Experiment from a (possibly overridden) ConfigDict.

    Raises:
      ValueError: a key that no setting has.
    """
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    parts = {"data": Data, "optim": Optim, "mesh": Mesh, "train": Train, "options": Options}
    for key, cls in parts.items():
        plain[key] = _build(cls, plain.get(key, {}), key)
    return _build(Experiment, plain, "config")


def _build(cls: type, values: Mapping, where: str) -> Any:
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{where}: no setting named {unknown[0]!r}; there are {', '.join(sorted(known))}")
    return cls(**{k: _as_tuples(v) for k, v in values.items()})


def _as_tuples(value: Any) -> Any:
    return tuple(_as_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def to_json(experiment: Experiment) -> str:
    """The resolved settings as indented JSON, the form kept in the run's folder."""
    return json.dumps(settings_of(experiment), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> Experiment:
    """Inverse of `to_json`."""
    return from_config_dict(json.loads(text))


def steps_in(duration: str, *, steps_per_epoch: int, total: int = 0) -> int:
    """Number of optimizer steps in "2000 steps", "10 epochs" or "5%" (of `total` steps).

    Raises:
      ValueError: the text is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|%)\s*", duration)
    if not match:
        raise ValueError(f'cannot read the duration {duration!r}; write "2000 steps", "10 epochs" or "5%"')
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return round(number / 100 * total)
    return round(number * (steps_per_epoch if unit.startswith("epoch") else 1))
