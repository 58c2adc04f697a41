"""Write small shards in the format of data_prep.build_shards, for tests that need shards but no videos."""

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import google_crc32c
import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from ymplug_jax.data import schema

SHAPES = ("圆形", "方形", "三角形")
COLOURS = ("红色", "蓝色", "绿色", "黄色")


def jpeg(seed: int, side: int = 24) -> bytes:
    """Return a JPEG of random noise."""
    image = np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


def example(i: int, frames: int = 4) -> bytes:
    """Return record i: frames seeded by i and one of twelve titles."""
    message = tf_example_pb2.Example()
    feature = message.features.feature
    feature[schema.IMAGE].bytes_list.value.extend(jpeg(100 * i + t) for t in range(frames))
    feature[schema.TIMESTAMP].int64_list.value.extend(range(0, frames * 100_000, 100_000))
    feature[schema.MEDIA_ID].bytes_list.value.append(f"videos/{i}.mp4".encode())
    feature[schema.TITLE].bytes_list.value.append(title(i).encode())
    feature[schema.CAPTION].bytes_list.value.extend([f"第{i}个".encode(), "视频".encode()])
    feature[schema.LABEL_TEXT].bytes_list.value.append("宠物".encode())
    feature[schema.LABEL_INDEX].int64_list.value.append(36)
    return message.SerializeToString()


def talk(
    text: str, media: Sequence[tuple[bool, str, list[bytes]]] = (), media_id: str = "", task_type: str = ""
) -> bytes:
    """Return a record of kind "instruct". `media`: (still image, file name, JPEGs) in the order of the placeholders of `text`."""
    message = tf_example_pb2.Example()
    feature = message.features.feature
    feature[schema.CHAT_TEXT].bytes_list.value.append(text.encode())
    feature[schema.CHAT_TASK].bytes_list.value.append(task_type.encode())
    feature[schema.MEDIA_ID].bytes_list.value.append((media_id or (media[0][1] if media else "talks.jsonl:1")).encode())
    for still, name, jpegs in media:
        feature[schema.MEDIUM_NAME].bytes_list.value.append(name.encode())
        feature[schema.MEDIUM_STILL].int64_list.value.append(int(still))
        feature[schema.MEDIUM_FRAMES].int64_list.value.append(len(jpegs))
        feature[schema.IMAGE].bytes_list.value.extend(jpegs)
        feature[schema.TIMESTAMP].int64_list.value.extend(range(0, len(jpegs) * 100_000, 100_000))
    return message.SerializeToString()


def write_talks(folder: Path, talks: Sequence[bytes], split: str = "train") -> Path:
    """Write one shard of conversations made by `talk`, its index and a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    _put(folder / schema.shard_name("clips", split, 0, 1), talks)
    call(folder, schema.INSTRUCT)
    return folder


def title(i: int) -> str:
    return f"{COLOURS[i % 4]}的{SHAPES[i % 3]}在移动"


def frame(payload: bytes) -> bytes:
    """Frame a payload as one TFRecord record."""
    size = len(payload).to_bytes(8, "little")
    crcs = (schema.masked_crc(google_crc32c.value(data)).to_bytes(4, "little") for data in (size, payload))
    return size + next(crcs) + payload + next(crcs)


def write(
    folder: Path, counts: tuple[int, ...] = (5, 4), split: str = "train", first: int = 0, kind: str = "pretrain"
) -> Path:
    """Write one shard per entry of `counts` with that many records, their indices, and a manifest with the given kind.

    Records have the columns of all kinds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    i = first
    for number, count in enumerate(counts):
        file = folder / schema.shard_name("clips", split, number, len(counts))
        _put(file, [example(place) for place in range(i, i + count)])
        i += count
    call(folder, kind)
    return folder


def _put(file: Path, payloads: Sequence[bytes]) -> None:
    """Write a shard and its index."""
    data, index = b"", []
    for payload in payloads:
        index.append((len(data), len(payload)))
        data += frame(payload)
    file.write_bytes(data)
    np.save(file.with_name(file.name + schema.INDEX_SUFFIX), np.array(index, np.int64).reshape(-1, 2))


def call(folder: Path, kind: str) -> None:
    """Write the manifest with the given kind."""
    facts = {"schema_version": schema.SCHEMA_VERSION, "kind": kind}
    (folder / schema.MANIFEST).write_text(json.dumps(facts), encoding="utf-8")


def tokenizer(file: Path) -> Path:
    """Train a sentencepiece model on the titles."""
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([title(i) for i in range(12)] * 4), model_writer=model, vocab_size=40, hard_vocab_limit=False,
        character_coverage=1.0, add_dummy_prefix=False, normalization_rule_name="identity", remove_extra_whitespaces=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    file.write_bytes(model.getvalue())
    return file


def vocabulary(file: Path) -> Path:
    """Write a BERT vocabulary of the titles' characters."""
    characters = sorted({c for i in range(12) for c in title(i)} | set("第个视频0123456789"))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in "0123456789")]
    file.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return file
