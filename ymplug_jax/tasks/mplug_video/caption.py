"""Video captioning: train through the frozen decoder on captions, then generate captions by search.

Beam search and metrics follow the reference, see `decode_beam.beam`, `caption_metrics` and docs/models/mplug_video.md, "Captioning".
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record, Split
from ymplug_jax.data.text import clean_caption, clean_text
from ymplug_jax.models import decode, decode_beam
from ymplug_jax.models.decode_sampling import Rules
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.tasks.common import caption_report, example_pages, losses, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.mplug_video import passes
from ymplug_jax.tasks.mplug_video.passes import spoken
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.task import CAPTIONED, Batch, Example, Report, Row, Task

SEARCHES = ("beam", "beam_by_length", "greedy", "sample")
ANSWERS = ("caption",)
SCORES = (*scores.losses("caption_loss", "loss"), *scores.captions())


@dataclasses.dataclass(frozen=True)
class Options:
    """How captions are generated."""

    prompt: str = ""  # Text between the start token and the caption.
    # Language of the captions, "zh" or "en": how generated captions are written and which tokens the metrics count.
    language: str = "zh"
    # How captions are generated: "beam" (the reference's beam search), "beam_by_length" (scores divided by the length), "greedy" or
    # "sample".
    search: str = "beam"
    beams: int = option(5, least=1)  # Number of beams of "beam" and "beam_by_length".
    # Length that the prompt is padded to; "beam" counts it in the length that divides the score, as the reference does.
    prompt_tokens: int = option(20, least=1)
    new_tokens: int = option(100, least=1)  # Largest number of generated tokens.
    top_k: int = option(5, least=0)  # "sample" draws from the top_k most likely tokens; 0 selects by top_p instead.
    # "sample" with top_k=0 draws from the most likely tokens of this total probability; 0 draws from all tokens.
    top_p: float = option(0.0, least=0, most=1)
    # Divisor of the logits in "sample"; values below 1 favour likely tokens.
    temperature: float = option(1.0, least=1e-30)


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUGVideo. Training draws one of a record's captions at random."""
    data, keep, options = experiment.data, experiment.train.keep_logits, build(Options, experiment.options)
    model, tokenizer = passes.model_of(experiment)
    length = data.max_tokens
    passes.check_room(model, max(length, options.prompt_tokens + options.new_tokens))
    if options.search not in SEARCHES:
        raise ValueError(
            f"config.options.search: unknown search {options.search!r}; choose one of {', '.join(SEARCHES)}"
        )

    scorable = caption_report.checker(options.language)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        known, texts = preprocess.given(tokenizer), record.captions
        chosen = texts[0 if rng is None else int(rng.integers(len(texts)))] if texts else ""
        pair = preprocess.encode_pair(known, options.prompt, clean_text(chosen, data.max_words), length)
        made = {"video": preprocess.video_of(record, data, rng), **pair, "labelled": np.array(bool(texts))}
        if rng is None:
            prompt = preprocess.encode(known, options.prompt, options.prompt_tokens)
            made |= {"prompt": prompt["ids"], "prompt_mask": prompt["mask"]}
        return made

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        def read(run: MPLUGVideo) -> jax.Array:
            return run.hidden(passes.see(run, batch["video"])["prefix"], batch["ids"], deterministic=key is None)

        ids, mask = batch["ids"], batch["mask"] * (batch["valid"] & batch["labelled"])[:, None]  # [B, L]
        hidden = within(model, params, read, key)  # [B, Q + L, H]
        mean = Mean(*passes.said(model, params, hidden, ids, mask, batch["prompt_length"], keep_logits=keep)[:2])
        return losses.ratio(mean), {"caption_loss": mean, "loss": mean}

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        prefix = passes.prefix_of(model, params, batch)
        begin, lengths = batch["prompt"], batch["prompt_mask"].sum(axis=1) - 1  # without the end token
        eos = preprocess.given(tokenizer).eos
        ids = generate(model, params["llm"], prefix, begin, lengths, options, eos, keys_of(batch["video"]))
        return {"generated": ids, "valid": batch["valid"]}

    def text_of(row: Mapping[str, np.ndarray]) -> str:
        decoded = preprocess.decode(preprocess.given(tokenizer), row["generated"])
        return clean_caption(decoded, options.prompt, options.language)

    def score(rows: list[Row], records: Split) -> Report:
        found, answers = caption_report.report_of([text_of(row) for row in rows], rows, records, options.language)
        return Report({"modalities": "video", "search": options.search} | found, answers)

    row = preprocess.row_spec(length)
    spec = {"video": preprocess.video_spec(data), "ids": row, "mask": row}
    spec |= {"prompt_length": jax.ShapeDtypeStruct((), jnp.int32), "labelled": jax.ShapeDtypeStruct((), jnp.bool_)}
    return passes.task_of(
        model,
        kinds=CAPTIONED,
        example=example,
        spec=spec,
        loss=loss,
        predict=predict,
        score=score,
        scorable=scorable,
        scores=caption_report.scores_of(SCORES, options.language),
        page=example_pages.captions(),
        describe={"caption": lambda row, record, best: spoken(record, text_of(row))},
    )


def keys_of(video: jax.Array) -> jax.Array:
    """Derive keys[B] from the pixels uint8[B, T, S, S, 3], so that samples for a clip do not depend on its batch."""
    pixels = video.reshape(len(video), -1).astype(jnp.uint32)
    places = jnp.arange(pixels.shape[1], dtype=jnp.uint32) * jnp.uint32(2654435761) + jnp.uint32(1)
    seeds = jnp.sum(pixels * places, axis=1, dtype=jnp.uint32)
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(0), seed))(seeds)


def generate(
    model: MPLUGVideo, lm: Params, prefix: jax.Array, ids: jax.Array, lengths: jax.Array, options: Options, eos: int,
    keys: jax.Array,
) -> jax.Array:  # fmt: skip
    """Generate token ids after the prompt with the search of the options: -> int32[B, tokens].

    Args:
      model: The model.
      lm: Parameters of the language model.
      prefix: f[B, Q, H], visual tokens.
      ids: int32[B, P], padded prompts.
      lengths: int32[B], prompt lengths including the start token.
      options: Search and its parameters.
      eos: Id of the end token.
      keys: key[B], for "sample".
    """
    width = ids.shape[1] + options.new_tokens
    prompt = decode.prompt_of(model.llm, lm, prefix, ids, lengths)
    if options.search in ("beam", "beam_by_length"):
        reference = options.search == "beam"
        # The reference's row starts with the padded prompt; generated tokens overwrite its padding.
        return decode_beam.beam(
            model.llm, lm, *prompt, beams=options.beams, eos=eos, visual=prefix.shape[1],
            new_tokens=width - 1 if reference else options.new_tokens, row_length=width if reference else 0,
        ).ids  # fmt: skip
    if options.search == "greedy":
        return decode.greedy(model.llm, lm, *prompt, new_tokens=options.new_tokens, eos=eos).ids
    top_p = 1.0 if options.top_k else options.top_p or 1.0
    rules = Rules(temperature=options.temperature, top_k=options.top_k, top_p=top_p)
    return decode.generate(model.llm, lm, *prompt, rules, keys, new_tokens=options.new_tokens, eos=eos).ids
