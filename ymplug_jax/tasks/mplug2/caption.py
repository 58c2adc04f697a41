"""Captioning with mPLUG-2: a decoder that reads the video's tokens alone, trained on captions and evaluated by beam search.

See docs/models/mplug2.md, "Captioning".
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record, Split
from ymplug_jax.data.text import clean_text
from ymplug_jax.models.language_model import Memory
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.tasks.common import caption_report, example_pages, losses, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.mplug2 import generation, inputs
from ymplug_jax.tasks.options import build, option
from ymplug_jax.tasks.presentation import Answer
from ymplug_jax.tasks.task import CAPTIONED, Batch, Example, Report, Row, Task

ANSWERS = ("caption",)
SCORES = (*scores.losses("caption_loss", "loss"), *scores.captions())


@dataclasses.dataclass(frozen=True)
class Options:
    """How captions are generated and scored."""

    prompt: str = (
        ""  # Text between the start token and the caption, in training and in generation; its tokens are no targets.
    )
    beams: int = option(5, least=1)  # Number of beams.
    least_tokens: int = option(4, least=0)  # Tokens of a caption without its end token, at the least.
    new_tokens: int = option(20, least=1)  # Largest number of generated tokens, end token included.
    language: str = "zh"  # Language of the captions, whose metrics are reported: "zh" or "en".


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` holds the fields of MPLUG2, without what reads text.

    Training draws one of a record's captions at random.
    """
    data, keep, options = experiment.data, experiment.train.keep_logits, build(Options, experiment.options)
    model = inputs.model_of(experiment)
    if model.reads or not model.generates:
        raise Mistake(
            "config.model: a captioning model has a decoder and reads no text; set config.model.reads=False and "
            "config.model.generates=True"
        )
    scorable = caption_report.checker(options.language)
    tokenizer, length = inputs.tokenizer_of(data, model), data.max_tokens
    prompt = [] if tokenizer is None else tokenizer.encode(options.prompt)
    search = {name: getattr(options, name) for name in ("beams", "least_tokens", "new_tokens")}
    generation.check(model.decoder, prompt=len(prompt), **search)
    if length < len(prompt) + 3:
        raise Mistake(
            f"config.data.max_tokens: {length} leaves no room for a caption between the prompt's {len(prompt)} tokens, the start token and the "
            "end token; raise it"
        )

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        known, texts = preprocess.given(tokenizer), record.captions
        chosen = texts[0 if rng is None else int(rng.integers(len(texts)))] if texts else ""
        words = known.encode(clean_text(chosen, data.max_words))
        return {
            "video": preprocess.video_of(record, data, rng),
            **inputs.encode(known, [*prompt, *words], length),
            "labelled": np.array(bool(texts)),
        }

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        video, kept = preprocess.normalize(batch["video"], model.vision.dtype), batch["valid"] & batch["labelled"]
        ids, mask = batch["ids"], batch["mask"] * kept[:, None]
        mean = caption_loss(model, params, video, ids, mask, len(prompt), key, keep_logits=keep)
        return losses.ratio(mean), {"caption_loss": mean, "loss": mean}

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        known, video = preprocess.given(tokenizer), preprocess.normalize(batch["video"], model.vision.dtype)
        memory = Memory(within(model, params, lambda run: run.encode_video(video)))
        begin = [known.bos, *prompt]
        made = generation.generate(model.decoder, params["decoder"], memory, begin, known.eos, **search)
        return made | {"valid": batch["valid"]}

    def text_of(row: Mapping[str, np.ndarray]) -> str:
        return generation.text_of(preprocess.given(tokenizer), row["generated"])

    def score(rows: list[Row], records: Split) -> Report:
        said = [text_of(row) for row in rows]
        found, answers = caption_report.report_of(said, rows, records, options.language)
        return Report({"modalities": "video"} | found, answers)

    def describe(row: Mapping[str, np.ndarray], record: Record, best: int) -> Answer:
        caption = text_of(row)
        return Answer({"video": record.media_id, "caption": caption}, (f"{record.media_id}: {caption}",))

    spec = {"video": preprocess.video_spec(data), **dict.fromkeys(("ids", "mask"), preprocess.row_spec(length))}
    return inputs.task_of(
        model,
        kinds=CAPTIONED,
        example=example,
        spec=spec | {"labelled": jax.ShapeDtypeStruct((), jnp.bool_)},
        lengths=lambda record: inputs.lengths(tokenizer, data, record.captions[:1], length - 2 - len(prompt)),
        loss=loss,
        predict=predict,
        score=score,
        scorable=scorable,
        scores=caption_report.scores_of(SCORES, options.language),
        page=example_pages.captions(),
        describe={"caption": describe},
    )


def caption_loss(
    model: MPLUG2,
    params: Params,
    video: jax.Array,
    ids: jax.Array,
    mask: jax.Array,
    prompt: int,
    key: jax.Array | None,
    *,
    keep_logits: bool = False,
) -> Mean:
    """Cross-entropy of the captions' tokens: (sum, number of targets), so that its value is the mean over all of them.

    Args:
      model: The model.
      params: Its parameters.
      video: Normalised video, f[B, T, S, S, 3].
      ids: int32[B, L]: start token, prompt, caption, end token, padding.
      mask: int32[B, L], 1 up to the end token; all 0 drops a row.
      prompt: Number of the prompt's tokens, which are no targets.
      key: PRNG key of dropout, None in evaluation.
      keep_logits: `config.train.keep_logits`.
    """
    calm = key is None

    def read(run: MPLUG2) -> jax.Array:
        tokens = run.encode_video(video, deterministic=calm)  # [B, M, C]
        return run.decode(ids, None, Memory(tokens), deterministic=calm)  # padding on the right is never seen

    def logits_of(states: jax.Array) -> jax.Array:
        return within(model, params, lambda run: run.logits(states))

    states = within(model, params, read, key)  # [B, L, C]
    lengths = jnp.full(len(ids), prompt)
    total, count, _ = losses.next_token_of(logits_of, states[:, :-1], ids, mask, lengths, keep_logits=keep_logits)
    return Mean(total, count)
