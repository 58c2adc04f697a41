"""Random access to records: content, verification and one-line errors."""

import http.server
import json
import pickle
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import shards
from ymplug_jax.data import schema
from ymplug_jax.data.records import CorruptRecord, Records


def first_shard(folder: Path) -> Path:
    return folder / schema.shard_name("clips", "train", 0, 2)


def index_of(shard: Path) -> Path:
    return shard.with_name(shard.name + schema.INDEX_SUFFIX)


def test_every_record_in_order(tmp_path: Path):
    records = Records(str(shards.write(tmp_path, (5, 0, 4))), "train")
    assert len(records) == 9
    for i in (8, 0, 4, 5, 3):
        record = records[i]
        assert record.media_id == f"videos/{i}.mp4" and record.title == shards.title(i)
        assert record.frames == [shards.jpeg(100 * i + t) for t in range(4)]
        assert record.captions == [f"第{i}个", "视频"] and (record.label_text, record.label_index) == ("宠物", 36)
        assert record.timestamps.tolist() == [0, 100_000, 200_000, 300_000]
    assert [record.title for record in records] == [shards.title(i) for i in range(9)]


@pytest.mark.parametrize("i", [-1, 9])
def test_no_such_record(tmp_path: Path, i: int):
    with pytest.raises(IndexError, match=rf"record {i} is out of range; split 'train' has 9 records"):
        Records(str(shards.write(tmp_path)), "train")[i]


def test_pickled_records_can_be_read(tmp_path: Path):
    records = Records(str(shards.write(tmp_path)), "train")
    assert records[7].title == pickle.loads(pickle.dumps(records))[7].title


def test_a_bare_record_has_defaults(tmp_path: Path):
    """Captions, labels and titles are optional, since not every kind of CSV has them."""
    message = shards.tf_example_pb2.Example()
    message.features.feature[schema.IMAGE].bytes_list.value.append(shards.jpeg(0))
    put(tmp_path, message.SerializeToString())
    record = Records(str(tmp_path), "train")[0]
    assert (record.media_id, record.title, record.captions, record.label_text) == ("", "", [], "")
    assert record.label_index == -1 and record.timestamps.size == 0


def test_conversations_with_and_without_media(tmp_path: Path):
    picture, clip, short = [shards.jpeg(1)], [shards.jpeg(2), shards.jpeg(3)], [shards.jpeg(4, side=16)]
    media = [(True, "a.png", picture), (False, "b.mp4", clip), (False, "c.mp4", short)]
    talks = [shards.talk("Human: 你好\nAI: 你好。", media_id="x.jsonl:7"), shards.talk("看", media, task_type="sft")]
    records = Records(str(shards.write_talks(tmp_path, talks)), "train")
    assert records.kind == "instruct" and len(records) == 2
    words, both = pickle.loads(pickle.dumps(records))[0], records[1]
    assert (words.text, words.media, len(words.frames), words.media_id) == (
        "Human: 你好\nAI: 你好。",
        (),
        0,
        "x.jsonl:7",
    )
    assert [(m.still, m.name, list(m.frames)) for m in both.media] == media, "a clip of one frame is not an image"
    assert both.frames == [*picture, *clip, *short] and both.timestamps.tolist() == [0, 0, 100_000, 0]
    assert (both.text, both.task_type, both.media_id, both.title, both.captions) == ("看", "sft", "a.png", "", [])
    assert records[0].timestamps.dtype == np.int64


@pytest.mark.parametrize("key", [schema.MEDIUM_NAME, schema.MEDIUM_STILL, schema.MEDIUM_FRAMES, schema.IMAGE])
def test_a_conversation_whose_media_do_not_agree(tmp_path: Path, key: str):
    message = shards.tf_example_pb2.Example.FromString(
        shards.talk("看", [(True, "a.png", [shards.jpeg(1)]), (False, "b.mp4", [shards.jpeg(2), shards.jpeg(3)])])
    )
    kept = message.features.feature[key]
    del (kept.bytes_list if kept.bytes_list.value else kept.int64_list).value[-1]
    records = Records(str(shards.write_talks(tmp_path, [message.SerializeToString()])), "train")
    with pytest.raises(CorruptRecord, match="record 0 at byte 0: its frames do not agree with its images and clips"):
        records[0]


def test_clips_of_other_kinds_keep_their_frames(tmp_path: Path):
    """A record without frames is damaged unless it is a conversation; a still image has one frame."""
    two = shards.talk("看", [(True, "a.png", [shards.jpeg(1), shards.jpeg(2)])])
    with pytest.raises(CorruptRecord, match="do not agree"):
        Records(str(shards.write_talks(tmp_path, [two])), "train")[0]
    assert all(
        record.media == () and record.text == "" for record in Records(str(shards.write(tmp_path / "p")), "train")
    )


def put(folder: Path, payload: bytes) -> None:
    """Write a data set with one record."""
    shard = folder / schema.shard_name("clips", "train", 0, 1)
    shard.write_bytes(shards.frame(payload))
    np.save(index_of(shard), np.array([[0, len(payload)]], np.int64))


def bad_payloads() -> dict[str, bytes]:
    """Return {expected message: payload} of invalid payloads with correct checksums."""
    empty, text = shards.tf_example_pb2.Example(), shards.tf_example_pb2.Example()
    text.features.feature[schema.IMAGE].bytes_list.value.append(shards.jpeg(0))
    text.features.feature[schema.TITLE].bytes_list.value.append("红".encode("gbk"))
    return {
        "not a tf.train.Example": b"\xff\xff not a message",
        "no image/encoded": empty.SerializeToString(),
        "not UTF-8": text.SerializeToString(),
    }


@pytest.mark.parametrize("says", bad_payloads())
def test_invalid_content_is_named(tmp_path: Path, says: str):
    put(tmp_path, bad_payloads()[says])
    with pytest.raises(CorruptRecord, match=f"00000-of-00001: record 0 at byte 0: .*{says}"):
        Records(str(tmp_path), "train")[0]


@pytest.mark.parametrize("where", [2, 9, 400, -2])
def test_a_flipped_bit_is_found(tmp_path: Path, where: int):
    """The bit is in the length, its checksum, the payload or the checksum of the payload."""
    shards.write(tmp_path)
    file = first_shard(tmp_path)
    offset, size = np.load(index_of(file))[3]
    data = bytearray(file.read_bytes())
    data[offset + (where if where > 0 else schema.HEADER_BYTES + size + schema.FOOTER_BYTES + where)] ^= 1
    file.write_bytes(data)
    records = Records(str(tmp_path), "train")
    assert records[2].title == shards.title(2)
    with pytest.raises(CorruptRecord, match=rf"clips-train.tfrecord-00000-of-00002: record 3 at byte {offset}: "):
        records[3]


@pytest.mark.parametrize("cut", [3, 20_000])
def test_truncated_shard(tmp_path: Path, cut: int):
    """The last record is truncated, or missing entirely."""
    file = first_shard(shards.write(tmp_path))
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(CorruptRecord, match=r"record 4 .*length differs from the index"):
        Records(str(tmp_path), "train")[4]


def test_missing_folder_and_split(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such folder; build it"):
        Records(str(tmp_path / "nowhere"), "train")
    with pytest.raises(FileNotFoundError, match="no split 'train' here, it has no shards"):
        Records(str(tmp_path), "train")
    shards.write(tmp_path)
    shards.write(tmp_path, split="test")
    with pytest.raises(FileNotFoundError, match="no split 'validation' here, it has test, train"):
        Records(str(tmp_path), "validation")


def test_missing_and_broken_index(tmp_path: Path):
    index = index_of(first_shard(shards.write(tmp_path)))
    kept = index.read_bytes()
    for content in (b"", kept[:-1], b"something else"):
        index.write_bytes(content)
        with pytest.raises(ValueError, match=r"index.npy is damaged .* write it again with .*data_prep.index_shards"):
            Records(str(tmp_path), "train")
    np.save(index, np.zeros((4, 3), np.int64))
    with pytest.raises(ValueError, match="is not an index"):
        Records(str(tmp_path), "train")
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"index.npy is missing \(one of 1\); .*data_prep.index_shards"):
        Records(str(tmp_path), "train")


def test_missing_shards(tmp_path: Path):
    first_shard(shards.write(tmp_path)).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"1 of 2 shards of split 'train' are missing, the first is .*00000-of-"
    ):
        Records(str(tmp_path), "train")


def test_two_builds_in_one_folder(tmp_path: Path):
    shards.write(tmp_path)
    shards.write(tmp_path, (1, 1, 1))
    with pytest.raises(ValueError, match=r"several builds .clips-train of 2 shards, clips-train of 3 shards"):
        Records(str(tmp_path), "train")


def test_schema_version(tmp_path: Path):
    manifest = shards.write(tmp_path) / schema.MANIFEST
    manifest.write_text(json.dumps({"schema_version": schema.SCHEMA_VERSION}))
    assert len(Records(str(tmp_path), "train")) == 9
    manifest.write_text(json.dumps({"schema_version": "9.0.0"}))
    with pytest.raises(ValueError, match=r"schema_version 9.0.0, but this version reads"):
        Records(str(tmp_path), "train")
    for content in ("{", "[]", "{}"):
        manifest.write_text(content)
        with pytest.raises(ValueError, match=r"manifest.json: not a manifest of data_prep"):
            Records(str(tmp_path), "train")


def test_no_tensorflow_to_read_records():
    code = "import sys, ymplug_jax.data.records; print({'tensorflow', 'av', 'torch'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


class Bucket(http.server.BaseHTTPRequestHandler):
    """Fake of Google Cloud Storage: answers listings and ranged reads. `folder` is gs://bucket/data."""

    folder: Path

    def do_GET(self):
        url = urllib.parse.urlparse(self.path)
        if url.path == "/storage/v1/b/bucket/o":
            query = urllib.parse.parse_qs(url.query)
            found = sorted(f"data/{file.name}" for file in self.folder.iterdir())
            items = [{"name": name} for name in found if query["startOffset"][0] <= name < query["endOffset"][0]]
            self.answer(200, json.dumps({"items": items}).encode())
            return
        file = self.folder / urllib.parse.unquote(url.path).removeprefix("/storage/v1/b/bucket/o/data/")
        if not file.is_file():
            self.answer(404, b"{}")
            return
        data = file.read_bytes()
        if "Range" not in self.headers:
            self.answer(200, data)
            return
        first, last = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
        part = data[first : last + 1]
        headers = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"}
        self.answer(206 if part else 416, part, headers if part else {})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in ({"x-goog-generation": "1", "Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A local folder that is also available as gs://bucket/data."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Bucket,), {"folder": tmp_path}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "token")
    yield tmp_path
    server.shutdown()
    thread.join()
    server.server_close()


def test_records_of_a_bucket(bucket: Path):
    shards.write(bucket)
    local, remote = Records(str(bucket), "train"), Records("gs://bucket/data", "train")
    assert len(remote) == 9
    for i in range(9):
        assert str(remote[i]) == str(local[i])
    assert pickle.loads(pickle.dumps(remote))[8].frames == local[8].frames


def test_mistakes_in_a_bucket(bucket: Path):
    with pytest.raises(FileNotFoundError, match="gs://bucket/nowhere: no such folder"):
        Records("gs://bucket/nowhere/", "train")
    file = first_shard(shards.write(bucket))
    with pytest.raises(FileNotFoundError, match="gs://bucket/data: no split 'test' here, it has train"):
        Records("gs://bucket/data", "test")
    records = Records("gs://bucket/data", "train")
    data = file.read_bytes()
    for cut in (3, 20_000):
        file.write_bytes(data[:-cut])
        with pytest.raises(CorruptRecord, match=r"gs://bucket/data/.*record 4 at byte .*length differs"):
            records[4]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"gs://bucket/data/clips-train.tfrecord-00000-of-00002: missing"):
        records[4]
