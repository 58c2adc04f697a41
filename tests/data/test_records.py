"""Random access: the right record, checked, and every mistake answered in one line."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

import shards
from ymplug_jax.data import schema
from ymplug_jax.data.records import CorruptRecord, Records


def test_every_record_in_order(tmp_path: Path):
    records = Records(str(shards.write(tmp_path, (5, 0, 4))), "train")
    assert len(records) == 9
    for i in (8, 0, 4, 5, 3):
        record = records[i]
        assert record.media_id == f"videos/{i}.mp4" and record.title == shards.title(i)
        assert record.frames == [shards.jpeg(100 * i + t) for t in range(4)]
        assert record.captions == [f"第{i}个", "视频"] and (record.label_text, record.label_index) == ("宠物", 36)
        assert record.timestamps.tolist() == [0, 100_000, 200_000, 300_000]


def test_pickled_records_read_on(tmp_path: Path):
    records = Records(str(shards.write(tmp_path)), "train")
    assert records[7].title == pickle.loads(pickle.dumps(records))[7].title


def first_shard(folder: Path) -> Path:
    return folder / schema.shard_name("clips", "train", 0, 2)


@pytest.mark.parametrize("where", [2, 9, 400, -2])
def test_a_flipped_bit_is_found(tmp_path: Path, where: int):
    """In the length, its checksum, the payload and the payload's checksum."""
    shards.write(tmp_path)
    file = first_shard(tmp_path)
    places = np.load(file.with_name(file.name + schema.INDEX_SUFFIX))
    offset, size = places[3]
    data = bytearray(file.read_bytes())
    data[offset + (where if where > 0 else schema.HEADER_BYTES + size + schema.FOOTER_BYTES + where)] ^= 1
    file.write_bytes(data)
    records = Records(str(tmp_path), "train")
    assert records[2].title == shards.title(2)
    with pytest.raises(CorruptRecord, match=rf"clips-train.tfrecord-00000-of-00002: record 3 at byte {offset}: "):
        records[3]


def test_truncated_shard(tmp_path: Path):
    shards.write(tmp_path)
    file = first_shard(tmp_path)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CorruptRecord, match="record 4 .*cut or replaced"):
        Records(str(tmp_path), "train")[4]


def test_mistakes_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such folder; build it"):
        Records(str(tmp_path / "nowhere"), "train")
    shards.write(tmp_path)
    with pytest.raises(FileNotFoundError, match="no split 'validation' here, there are: train"):
        Records(str(tmp_path), "validation")
    index = first_shard(tmp_path).with_name(first_shard(tmp_path).name + schema.INDEX_SUFFIX)
    kept = index.read_bytes()
    index.unlink()
    with pytest.raises(FileNotFoundError, match="data_prep.index_shards"):
        Records(str(tmp_path), "train")
    index.write_bytes(kept)
    (tmp_path / schema.MANIFEST).write_text(json.dumps({"schema_version": "9.0.0"}))
    with pytest.raises(ValueError, match="schema 9.0.0"):
        Records(str(tmp_path), "train")
    (tmp_path / schema.MANIFEST).unlink()
    first_shard(tmp_path).unlink()
    with pytest.raises(FileNotFoundError, match="shard 0 of 2 of split 'train' is missing"):
        Records(str(tmp_path), "train")
