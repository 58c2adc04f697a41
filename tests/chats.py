"""The run folder of a tiny chat model with random weights, which says something else about every picture."""

from pathlib import Path

import cv2
import jax
import numpy as np
import tokenizers

from ymplug_jax.core import checkpoint, config
from ymplug_jax.core.config import Data, Experiment, Optim, Train
from ymplug_jax.core.state import merge, split
from ymplug_jax.data.conversation import SYSTEM
from ymplug_jax.models.bloom import Bloom
from ymplug_jax.models.clip_vit import ClipViT
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.models.mplug_chat import MPLUGChat
from ymplug_jax.models.query_abstractor import QueryAbstractor
from ymplug_jax.models.qwen import Qwen
from ymplug_jax.tasks import options
from ymplug_jax.training import setup

VOCAB, CONTEXT = 300, 384
LMS = {
    "bloom": Bloom(vocab=VOCAB, width=32, depth=2, heads=4),
    "gpt3": GPT3(vocab=VOCAB, width=32, depth=2, heads=4, max_positions=CONTEXT + 128),
    "qwen": Qwen(vocab=VOCAB, width=32, depth=2, heads=4, kv_heads=2, head_dim=8, mlp=48, max_positions=CONTEXT + 128),
}


def tokenizer(file: Path, vocab: int = VOCAB) -> Path:
    """A byte-level tokenizer like BLOOM's, with a few Chinese words; a character may take three tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet() if vocab > 260 else [],
    )  # fmt: skip
    texts = ["视频里有什么？", SYSTEM, "\nHuman: ", "AI: "]
    texts += ["视频里有一只猫在地上走。", "一个红色的圆形。"] if vocab > 260 else []
    made.train_from_iterator(texts * 3, trainer)
    made.save(str(file))
    return file


def experiment(llm: LanguageModel, vocabulary: Path) -> Experiment:
    model = MPLUGChat(
        ClipViT(image_size=16, patch_size=8, depth=2, width=16, heads=2, mlp=32),
        QueryAbstractor(queries=3, depth=1, heads=2, mlp=32),
        llm,
    )
    data = Data(frames=2, image_size=16, max_tokens=CONTEXT, augment=False, tokenizer=str(vocabulary), examples=8)
    train = Train(batch_size=8, duration="1 steps", frozen_dtype="float32")
    return options.completed(
        Experiment("mplug_chat_instruct", model, data=data, train=train, optim=Optim(warmup="0 steps"))
    )


def run_of(made: Experiment) -> tuple[setup.Run, dict]:
    """The prepared run and random parameters."""
    run = setup.prepare(made, jax.devices()[:1])
    rng = np.random.default_rng(0)

    def value(path: tuple, leaf: jax.Array) -> jax.Array:
        kind = path[-1].key
        spread = {"scale": 0.1, "bias": 0.1}.get(kind, 0.5)  # large enough for answers to depend on the picture
        made = float(kind == "scale") + rng.normal(0, spread, leaf.shape)
        return jax.device_put(made.astype(leaf.dtype), leaf.sharding)

    return run, jax.tree.map_with_path(value, merge(run.state.trainable, run.frozen))


def run_folder(home: Path, llm: LanguageModel = LMS["bloom"]) -> Path:
    """A run after one step, in `home`/chat."""
    folder, vocabulary = home / "chat", tokenizer(home / "tokenizer.json")
    made = experiment(llm, vocabulary)
    run, params = run_of(made)
    trainable, frozen = split(params, run.frozen_patterns)
    state = run.state.replace(step=jax.numpy.int32(1), trainable=trainable, opt_state=jax.jit(run.tx.init)(trainable))
    stored = checkpoint.Checkpoints(str(folder))
    stored.save_frozen(frozen)
    stored.save(state, 1, 8)
    stored.close()
    (folder / "config.json").write_text(config.to_json(made), encoding="utf-8")
    (folder / "tokenizer").mkdir()
    vocabulary.rename(folder / "tokenizer" / "tokenizer.json")
    return folder


def picture(file: Path, level: int) -> Path:
    """An image of one grey level on black."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 10 : 10 + level % 40] = level
    cv2.imwrite(str(file), pixels)
    return file
