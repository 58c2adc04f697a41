"""A tiny chat model, its experiment, and conversations with pictures in memory; shared by the tests of the chat tasks."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

import shards
from ymplug_jax.core import sharding, state
from ymplug_jax.core.config import Data, Experiment, Mesh, Optim, Train
from ymplug_jax.data.records import Medium, Record
from ymplug_jax.models import mplug_chat
from ymplug_jax.models.bloom import Bloom
from ymplug_jax.models.clip_vit import ClipViT
from ymplug_jax.models.mplug_chat import MPLUGChat
from ymplug_jax.models.query_abstractor import QueryAbstractor
from ymplug_jax.training import setup
from ymplug_jax.training.setup import Run

LENGTH, SLOTS = 48, 3
MODEL = MPLUGChat(
    vision=ClipViT(image_size=16, patch_size=8, depth=2, width=16, heads=2, mlp=24),
    abstractor=QueryAbstractor(queries=SLOTS - 1, depth=1, heads=2, mlp=24),
    llm=Bloom(vocab=64, width=32, depth=2, heads=2),
)


def model(partition: str) -> MPLUGChat:
    """Return the tiny model with the adapters that a partition trains."""
    targets = mplug_chat.LORA[partition]
    llm = MODEL.llm.clone(lora_rank=2, lora_scale=4.0, lora_targets=targets) if targets else MODEL.llm
    return MODEL.clone(llm=llm)


def experiment(
    tokenizer: str, task: str = "instruct", partition: str = "adapters_abstractor_lora", **changes
) -> Experiment:
    """Return an experiment with a batch size of 4; change settings by group, e.g. train={"accumulate": 2}, mesh={"fsdp": 4}."""
    groups = {
        "data": Data(tokenizer=tokenizer, frames=2, image_size=16, max_tokens=LENGTH, augment=False, examples=64),
        "optim": Optim(lr=1e-2, warmup="0 steps"),
        "mesh": Mesh(),
        "train": Train(
            batch_size=4, duration="40 steps", frozen_dtype="float32", frozen=mplug_chat.PARTITIONS[partition]
        ),
    }
    options = {"videos_per_row": 2} | ({"images_per_row": 2} if task == "instruct" else {}) | changes.pop("options", {})
    made = changes.pop("model", model(partition))
    for name, change in changes.items():
        groups[name] = dataclasses.replace(groups[name], **change)
    return Experiment(task=f"mplug_chat_{task}", model=made, options=options, **groups)


def medium(kind: str, seed: int) -> Medium:
    """Return an "image", or a "clip" of four frames."""
    count = 1 if kind == "image" else 4
    return Medium(kind == "image", f"{kind}{seed}", [shards.jpeg(seed + i) for i in range(count)])


def talk(name: str, kinds: Sequence[str], turns: Sequence[tuple[str, str]], seed: int = 0) -> Record:
    """Return a conversation with media of the given kinds before its first question."""
    places = {"image": "<image>", "clip": "<|video|>"}
    lines = [f"Human: {places[kind]}" for kind in kinds]
    lines += [line for question, answer in turns for line in (f"Human: {question}", f"AI: {answer}")]
    media = tuple(medium(kind, seed + 10 * i) for i, kind in enumerate(kinds))
    frames = [frame for one in media for frame in one.frames]
    return Record(name, frames, np.zeros(len(frames), np.int64), "", [], "", -1, "\n".join(lines), media)


def batch_of(run: Run, rows: Sequence[Sequence[Record]], **changes) -> dict[str, jax.Array]:
    """Return the global batch of packed rows on the devices; `changes` replaces arrays by key."""
    examples = [run.task.example(records, np.random.default_rng(0)) for records in rows]
    local = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
    local |= {"valid": np.ones(len(rows), bool)} | changes
    place = sharding.local_rows(len(rows), run.mesh)
    return sharding.put_batch({key: value[place] for key, value in local.items()}, place, len(rows), run.mesh)


def prepare(tokenizer: str, devices: int = 1, **changes) -> Run:
    """Prepare the run on the first `devices` virtual devices."""
    return setup.prepare(experiment(tokenizer, **changes), jax.devices()[:devices])


def params_of(run: Run) -> dict:
    """Return random parameters on the devices: a decoder that listens to what it is shown, and adapters that do not start at 0."""
    rng = np.random.default_rng(0)

    def draw(path: str, leaf: jax.Array) -> jax.Array:
        wide = leaf.ndim > 2 or path.endswith("token_embed")
        value = rng.normal(0, leaf.shape[-1] ** -0.5 if wide else 0.02, leaf.shape) + path.endswith("scale")
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    flat = state.flatten(state.merge(run.state.trainable, run.frozen))
    return state.unflatten({path: draw(path, leaf) for path, leaf in flat.items()})


def started(run: Run, params: dict) -> tuple[state.TrainState, dict]:
    """Return (state at step 0, frozen parameters) with the given parameters."""
    trainable, frozen = state.split(params, run.frozen_patterns)
    now = state.TrainState(np.int32(0), trainable, run.tx.init(trainable))
    places = jax.tree.map(lambda leaf: leaf.sharding, (run.state, run.frozen))
    return jax.device_put((now, frozen), places)
