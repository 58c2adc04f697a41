"""Model, tokenizer and examples of mPLUG-2, shared by its tasks. See docs/models/mplug2.md."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ymplug_jax.core.config import Data, Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import text
from ymplug_jax.data.text import Tokenizer
from ymplug_jax.models import mplug2
from ymplug_jax.models.bert import Text
from ymplug_jax.models.bert_decoder import Decoder
from ymplug_jax.models.clip_vit import VideoClipViT
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.tasks.common import preprocess
from ymplug_jax.tasks.task import Example, Task, build

# Special tokens of BERT's released vocabularies, used for planning without a tokenizer.
SPECIALS = {"pad": 0, "unk": 100, "bos": 101, "eos": 102, "mask": 103}
TOWERS = {"mplug2": VideoClipViT, "mplug_youku": TimeSformer}  # video encoder by variant
# Parameters that a run may start without, whatever its task: what neither CLIP nor BERT has.
FRESH = ("universal/latents", "visual_norm/.*", "connector/.*", r"\w+/blocks/cross(_norm)?/.*")


def model_of(experiment: Experiment) -> MPLUG2:
    """Make the model and check that it fits the data.

    Raises:
      Mistake: Model and data disagree, or a setting is wrong; the message names the setting to change.
    """
    data, settings = experiment.data, experiment.model
    if isinstance(settings, Mapping):
        variant = settings.get("variant", MPLUG2.variant)
        if variant not in mplug2.VARIANTS:
            raise Mistake(
                f"config.model.variant: unknown variant {variant!r}; choose one of {', '.join(mplug2.VARIANTS)}"
            )
        tower = build(TOWERS[variant], settings.get("vision", {}), "config.model.vision")
        settings = {**settings, "vision": tower}
        if isinstance(decoder := settings.get("decoder"), Mapping):
            settings["decoder"] = {name: value for name, value in decoder.items() if name != "kind"}
            if decoder.get("kind", Decoder.kind) != Decoder.kind:
                raise Mistake(
                    f"config.model.decoder.kind: {decoder['kind']!r} cannot read a video; leave it {Decoder.kind!r}"
                )
    model: MPLUG2 = build(MPLUG2, settings)
    if not isinstance(model.vision, TOWERS[model.variant]):
        raise Mistake(
            f"config.model.variant: {model.variant!r} has a {TOWERS[model.variant].__name__} as video encoder; make the model with models/mplug2.py, sized"
        )
    _check(data, model)
    return model


def _check(data: Data, model: MPLUG2) -> None:
    vision = model.vision
    if isinstance(vision, TimeSformer):
        preprocess.check_video(data, vision)
    elif data.image_size != vision.image_size:
        raise Mistake(
            f"config.data.image_size: {data.image_size} px, but config.model.vision.image_size is {vision.image_size}; make them equal"
        )
    for name, part in _tables(model).items():
        if data.max_tokens > part.max_positions:
            raise Mistake(
                f"config.data.max_tokens: {data.max_tokens} exceeds config.model.{name}.max_positions {part.max_positions}; lower it"
            )


def _tables(model: MPLUG2) -> dict[str, Text | Decoder]:
    """The parts that have a table of words, by the name of their setting."""
    return ({"text": model.text} if model.reads else {}) | ({"decoder": model.decoder} if model.generates else {})


def tokenizer_of(data: Data, model: MPLUG2) -> Tokenizer | None:
    """Load the WordPiece tokenizer of the settings; None if they name none, as planning needs none.

    Raises:
      ValueError: The tokenizer has more tokens than the model's vocabularies, or no [MASK] token.
    """
    tables = _tables(model)
    settings = " and ".join(f"config.model.{name}.vocab" for name in tables)
    tokenizer = preprocess.tokenizer_for(data, min(part.vocab for part in tables.values()), settings)
    if tokenizer is not None and getattr(tokenizer, "mask", None) is None:
        raise ValueError(f"{data.tokenizer} has no [MASK] token; give a BERT vocab.txt or tokenizer.json")
    return tokenizer


def specials_of(tokenizer: Tokenizer | None) -> dict[str, int]:
    """Ids of the special tokens by name."""
    return SPECIALS if tokenizer is None else {name: getattr(tokenizer, name) for name in SPECIALS}


def encode(
    tokenizer: Tokenizer, words: Sequence[int], length: int, name: str = "", *, end: bool = True
) -> dict[str, np.ndarray]:
    """Arrays of tokens: start token, words, end token with `end`, padding; too long a text is cut before its end token.

    Args:
      tokenizer: Its special tokens are used.
      words: Ids of the text.
      length: L.
      name: Key of the ids; "" names them and their mask "ids" and "mask", any other name "NAME" and "NAME_mask".
      end: Adds the end token.

    Returns:
      Two arrays int32[L].
    """
    eos = tokenizer.eos if end else None
    ids, mask = text.encode_words(words, length, bos=tokenizer.bos, eos=eos, pad=tokenizer.pad)
    return {"ids": ids, "mask": mask} if not name else {name: ids, f"{name}_mask": mask}


def continuation(
    tokenizer: Tokenizer, words: Sequence[int], length: int, rng: np.random.Generator | None, instruction: str = ""
) -> Example:
    """A prefix and the target that continues it.

    The words are cut before a position drawn from 0 to n - 1; in evaluation, in the middle. With `instruction`, this is done for half
    of the examples of training; the others, and all of evaluation, have the instruction as prefix and all words as target.

    Args:
      tokenizer: Encodes the instruction; its special tokens are used.
      words: Ids of the title.
      length: L of both.
      rng: None in evaluation.
      instruction: A text, or "" for none.

    Returns:
      prefix, prefix_mask, target and target_mask, int32[L] each; only the target has an end token.
    """
    cut = len(words) // 2 if rng is None else int(rng.integers(max(len(words), 1)))
    whole = bool(instruction) and (rng is None or bool(rng.integers(2)))
    before, after = (tokenizer.encode(instruction), words) if whole else (words[:cut], words[cut:])
    return {
        **encode(tokenizer, before, length, "prefix", end=False),
        **encode(tokenizer, after, length, "target"),
    }


def lengths(tokenizer: Tokenizer | None, data: Data, texts: Sequence[str], room: int) -> tuple[int, int]:
    """(number of tokens of the texts, how many of them `config.data.max_words` and `room` tokens a text leave)."""
    known = preprocess.given(tokenizer)
    whole = [len(known.encode(text.clean_text(one, len(one) + 1))) for one in texts]
    kept = [len(known.encode(text.clean_text(one, data.max_words))) for one in texts]
    return sum(whole), sum(min(count, room) for count in kept)


def task_of(model: MPLUG2, **own: Any) -> Task:
    """The `Task` record of a task on this model; `own` holds its other fields."""

    def init(key: jax.Array) -> dict[str, Any]:
        return mplug2.init(model, key)

    fields: dict[str, Any] = {"frozen": (), "init": init, "resize": mplug2.RESIZE, **own}
    fields["fresh"] = (*mplug2.TEMPORAL[model.variant], *FRESH, *fields.get("fresh", ()))
    return Task(axes=mplug2.axes_of(model), **fields)
