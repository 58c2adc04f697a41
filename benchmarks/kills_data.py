"""Small data and settings for `kills`: models that compile in seconds, and shards of noise with twelve titles."""

import io
import itertools
import json
from pathlib import Path

import cv2
import google_crc32c
import numpy as np
from etils import epath

from benchmarks.loader import feature, message
from ymplug_jax.data import schema

TITLES = [
    f"{colour}的{shape}在移动" for colour in ("红色", "蓝色", "绿色", "黄色") for shape in ("圆形", "方形", "三角形")
]
SPLITS = {"train": 53, "validation": 9}  # not a multiple of the batch: the last batch of an epoch ends in the next one
VISION = ("image_size=16", "patch_size=8", "width=16", "heads=2", "frames=2", "depth=1")
SHARED = (
    *(f"--config.model.vision.{size}" for size in VISION),
    "--config.data.frames=2",
    "--config.data.image_size=16",
    "--config.data.max_tokens=12",
)
PARTS = itertools.product(("text", "fusion", "decoder"), ("depth=1", "width=16", "heads=2", "hidden=24"))
# Task -> flags. The queue of mPLUG-2 wraps around within the run.
TASKS = {
    "pretrain": (
        "--config=configs/tiny/pretrain.py", "--config.model.abstractor.queries=4", "--config.model.abstractor.heads=2",
        "--config.model.llm.vocab=64", "--config.model.llm.width=32", "--config.model.llm.depth=1",
    ),
    "mplug2": (
        "--config=configs/tiny/mplug2_pretrain.py", *(f"--config.model.{part}.{size}" for part, size in PARTS),
        "--config.model.contrastive_width=8", "--config.options.queue=32", "--config.options.group=4", "--config.options.soft_ramp=4",
    ),
}  # fmt: skip


def make(task: str, local: Path, folder: epath.Path) -> list[str]:
    """Write shards and a tokenizer.

    Args:
      task: one of TASKS.
      local: new folder for the tokenizer.
      folder: new folder for the shards, local or in a bucket.

    Returns:
      The flags that name the task, its sizes and the data.
    """
    local.mkdir(parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate(SPLITS.items()):
        _shard(folder, split, count, seed)
    facts = {"schema_version": schema.SCHEMA_VERSION, "kind": "pretrain"}
    (folder / schema.MANIFEST).write_text(json.dumps(facts))
    tokenizer = _vocabulary(local) if task == "mplug2" else _pieces(local)
    return [*TASKS[task], *SHARED, f"--config.data.path={folder}", f"--config.data.tokenizer={tokenizer}"]


def _shard(folder: epath.Path, split: str, count: int, seed: int) -> None:
    rng, data, index = np.random.default_rng(seed), b"", []
    for i in range(count):
        pictures = rng.integers(0, 256, (4, 24, 32, 3), dtype=np.uint8)
        entries = {
            schema.IMAGE: [cv2.imencode(".jpg", picture)[1].tobytes() for picture in pictures],
            schema.TITLE: [TITLES[i % len(TITLES)].encode()],
        }
        payload = message(b"".join(message(feature(name, values)) for name, values in entries.items()))
        size = len(payload).to_bytes(8, "little")
        head, tail = (schema.masked_crc(google_crc32c.value(part)).to_bytes(4, "little") for part in (size, payload))
        index.append((len(data), len(payload)))
        data += size + head + payload + tail
    shard = folder / schema.shard_name("noise", split, 0, 1)
    shard.write_bytes(data)
    table = io.BytesIO()
    np.save(table, np.array(index, np.int64))
    (folder / f"{shard.name}{schema.INDEX_SUFFIX}").write_bytes(table.getvalue())


def _pieces(folder: Path) -> Path:
    import sentencepiece

    model, file = io.BytesIO(), folder / "titles.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TITLES * 4), model_writer=model, vocab_size=40, hard_vocab_limit=False, character_coverage=1.0,
        add_dummy_prefix=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    return file


def _vocabulary(folder: Path) -> Path:
    file = folder / "vocab.txt"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(set("".join(TITLES)))]
    file.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return file
