"""Pre-training of mPLUG-video: the frozen language model tells the title of the video; optionally a contrastive loss beside it.

The caption loss is one token mean over the global batch. (The reference averages per process first, so that processes with
short titles weigh more; on one process the two are the same.)
"""

import jax
import jax.numpy as jnp
import numpy as np

from ymplug_jax.config import Experiment
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import decode, mplug_video
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.state import Params
from ymplug_jax.tasks import inputs, losses
from ymplug_jax.tasks.task import Batch, Example, Task, build
from ymplug_jax.writer import Mean, Metrics


def make(experiment: Experiment) -> Task:
    """The task for `experiment.model` = fields of MPLUGVideo; contrastive where the model has the heads for it."""
    data = experiment.data
    model: MPLUGVideo = build(MPLUGVideo, experiment.model)
    queries, length = model.abstractor.queries, data.max_tokens
    if data.frames != model.vision.frames or data.image_size != model.vision.image_size:
        raise ValueError(
            f"config.data gives {data.frames} frames of {data.image_size} px, config.model.vision takes "
            f"{model.vision.frames} of {model.vision.image_size}; make them equal"
        )
    if queries + length > model.llm.max_positions:
        raise ValueError(
            f"{queries} queries + config.data.max_tokens {length} exceed config.model.llm.max_positions {model.llm.max_positions}"
        )
    tokenizer = inputs.tokenizer_for(data, model.llm.vocab)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        title = clean_text(record.title, data.max_words)
        return {"video": inputs.video_of(record, data, rng), **inputs.encode(inputs.given(tokenizer), title, length)}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        run = model.bind({"params": params}, rngs={} if key is None else {"dropout": key})
        video = inputs.normalize(batch["video"], model.vision.dtype)
        mask = batch["mask"] * batch["valid"][:, None]  # [B, L]
        seen = run.encode_video(video)
        hidden = run.hidden(seen["prefix"], batch["ids"], deterministic=key is None)  # [B, Q + L, H]
        logits = run.logits(hidden[:, queries:-1])  # [B, L - 1, V]: only text is predicted
        caption = Mean(*losses.next_token(logits, batch["ids"], mask))
        correct = jnp.argmax(logits, axis=-1) == batch["ids"][:, 1:]
        accuracy = Mean(jnp.sum(correct * losses.target_mask(mask), dtype=jnp.float32), caption.weight)
        total, metrics = _ratio(caption), {"caption_loss": caption, "token_accuracy": accuracy}
        if model.contrastive_width:
            text_hidden = run.hidden(None, batch["ids"], deterministic=key is None)
            units = run.contrastive(seen["image_query"], text_hidden, mask)
            pair = losses.contrastive(units["video"], units["text"], units["temperature"], valid=batch["valid"])
            metrics["contrastive_loss"] = Mean(*pair)
            total += _ratio(metrics["contrastive_loss"])
        metrics["loss"] = Mean(total * caption.weight, caption.weight)
        return total, metrics

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        run = model.bind({"params": params})
        prefix = run.encode_video(inputs.normalize(batch["video"], model.vision.dtype))["prefix"]
        begin = batch["ids"][:, :1]  # [B, 1]: the start token
        ones = jnp.ones(begin.shape[0], jnp.int32)
        eos = inputs.given(tokenizer).eos
        out = decode.greedy(model.llm, params["llm"], prefix, begin, ones, new_tokens=length - 1, eos=eos)
        return {"generated": out.ids, "ids": batch["ids"], "valid": batch["valid"]}

    def score(rows: list[dict[str, np.ndarray]]) -> tuple[dict[str, float], list[dict]]:
        def text(ids: np.ndarray) -> str:
            return inputs.decode(inputs.given(tokenizer), ids)

        pairs = [{"title": text(row["ids"]), "generated": text(row["generated"])} for row in rows]
        right = sum(pair["title"] == pair["generated"] for pair in pairs)
        return {"exact_titles": right, "exact_share": right / max(len(pairs), 1)}, pairs

    size = data.image_size
    spec = {
        "video": jax.ShapeDtypeStruct((data.frames, size, size, 3), jnp.uint8),
        "ids": jax.ShapeDtypeStruct((length,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((length,), jnp.int32),
    }
    return Task(
        axes=mplug_video.AXES,
        frozen=mplug_video.FROZEN,
        init=lambda key: mplug_video.init(model, key),
        example=example,
        spec=spec,
        loss=loss,
        predict=predict,
        score=score,
    )


def _ratio(mean: Mean) -> jax.Array:
    return mean.total / jnp.maximum(mean.weight, 1.0)
