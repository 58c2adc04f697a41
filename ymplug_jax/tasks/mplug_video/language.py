"""Language modelling on titles, which trains the tiny decoders before they are frozen; large decoders are converted instead.

A sequence is one title repeated, starting at a random token. All position embeddings are therefore trained, and the model learns to
use what precedes the text, which later is the visual prefix.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.metrics import Mean, Metrics
from ymplug_jax.core.state import Params
from ymplug_jax.data.records import Record
from ymplug_jax.data.text import clean_text
from ymplug_jax.models import language_model, language_models
from ymplug_jax.tasks.common import losses, preprocess, scores
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.presentation import Answer
from ymplug_jax.tasks.task import TITLED, Batch, Example, Task, build

ANSWERS = ("perplexity",)
SCORES = scores.losses("loss")


class LanguageModel(nn.Module):
    """A decoder whose parameters are under "llm", as in mPLUG-video."""

    # Decoder to train, by kind and size.
    llm: language_model.LanguageModel = language_models.SIZES["1.3b"]

    def __call__(self, ids: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits of the next token: int[B, L] -> f32[B, L - 1, V], position j for token j + 1."""
        return self.llm.logits(self.llm(self.llm.embed(ids), deterministic=deterministic)[:, :-1])


def make(experiment: Experiment) -> Task:
    """Make the task; `experiment.model` is {"llm": fields of a decoder}."""
    data = experiment.data
    model: LanguageModel = build(LanguageModel, experiment.model)
    length, limit = data.max_tokens, model.llm.max_positions
    if limit is not None and length > limit:
        raise Mistake(f"config.data.max_tokens: {length} exceeds config.model.llm.max_positions {limit}; lower it")
    tokenizer = preprocess.tokenizer_for(data, model.llm.vocab)

    def example(record: Record, rng: np.random.Generator | None) -> Example:
        known = preprocess.given(tokenizer)
        end = [known.eos] if known.eos != known.bos else []  # a shared token ends one title and starts the next
        title = [known.bos, *known.encode(clean_text(record.title, data.max_words)), *end]
        first = 0 if rng is None else int(rng.integers(len(title)))
        ids = np.resize(np.array(title, np.int32), first + length)[first:]  # repeats the title
        if rng is None:  # the first repetition is read as a text of its own, see `predict`
            return {
                "ids": ids,
                "tokens": np.array(len(title), np.int32),
                "read": np.array(min(len(title), length), np.int32),
            }
        return {"ids": ids}

    def predict(params: Params, batch: Batch) -> dict[str, jax.Array]:
        logits = within(model, params, lambda run: run(batch["ids"], deterministic=True), None)
        targets = batch["ids"][:, 1:]  # [B, L - 1]
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        inside = jnp.arange(1, length) < batch["read"][:, None]  # [B, L - 1]
        total = jnp.sum(jnp.where(inside, log_probs, 0.0), axis=-1)
        return {"log_prob": total, "tokens": batch["tokens"], "read": batch["read"]}

    def loss(params: Params, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Metrics]:
        logits = within(model, params, lambda run: run(batch["ids"], deterministic=key is None), key)
        mask = jnp.ones_like(batch["ids"]) * batch["valid"][:, None]
        mean = Mean(*losses.next_token(logits, batch["ids"], mask))
        return losses.ratio(mean), {"loss": mean}

    return Task(
        kinds=(*TITLED, "text"),
        axes=tuple((f"llm/{path}", words) for path, words in language_models.axes_of(model.llm)),
        frozen=(),
        init=lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))["params"],
        example=example,
        spec={"ids": jax.ShapeDtypeStruct((length,), jnp.int32)},
        asked_spec={name: jax.ShapeDtypeStruct((), jnp.int32) for name in ("tokens", "read")},
        loss=loss,
        predict=predict,
        describe={"perplexity": _perplexity},
        scores=SCORES,
    )


def _perplexity(row: Mapping[str, np.ndarray], record: Record, best: int) -> Answer:
    """Log-probability of a title's tokens after its first, and what its length was measured in. Not one of several answers."""
    found = {"log_prob": float(row["log_prob"]), "tokens": int(row["tokens"]) - 1, "read": int(row["read"]) - 1}
    return Answer({"video": record.media_id, **found}, (f"log-probability {found['log_prob']:.3f}",))
