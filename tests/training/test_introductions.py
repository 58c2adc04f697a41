"""introduction.txt of a run: found in its records, kept on resume, copied to the best step."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from etils import epath

import shards
from ymplug_jax.core.config import Data, Experiment
from ymplug_jax.core.exits import PlaceFailed
from ymplug_jax.data import conversation
from ymplug_jax.data.source import open_split
from ymplug_jax.tasks.mplug_chat import introduction
from ymplug_jax.training import introductions


def folder(place: Path, *texts: str, answer: str = "AI: 好") -> str:
    shards.write_talks(place, [shards.talk(f"{text}Human: 说{i}\n{answer}") for i, text in enumerate(texts)])
    return str(place)


def test_the_most_frequent_introduction_of_all_folders(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one", *["b\n"] * 2, "c\n"), folder(tmp_path / "two", "a\n", "", "b\n", "a\n", "a\n")
    assert introduction.of_split(open_split(one, "train")) == "b"
    assert introduction.of_split(open_split(two, "train")) == "a"
    assert introduction.of_split(open_split(f"{one},{two}", "train")) == "a"  # as often as "b", and first by name
    none = folder(tmp_path / "none", *["a\n"] * 2, answer="")
    assert introduction.of_split(open_split(none, "train")) == conversation.SYSTEM
    bare = folder(tmp_path / "bare", "", "", "a\n")
    assert introduction.of_split(open_split(bare, "train")) == ""
    shard = next((tmp_path / "bare").glob("*.tfrecord*00001"))
    content = bytearray(shard.read_bytes())
    content[20] ^= 255
    shard.write_bytes(content)
    assert introduction.of_split(open_split(bare, "train")) == ""  # a corrupt record is left out: "" and "a" once each


def test_a_sample_of_many_records_is_spread_evenly() -> None:
    """And a regular order of the rows does not hide some of them."""

    class Many(list):
        def __getitem__(self, i: int) -> SimpleNamespace:
            read.append(i)
            return SimpleNamespace(text=f"{'b' if i % 2 or i > 9000 else 'a'}\nHuman: x\nAI: y")

    read: list[int] = []
    assert introduction.of_split(Many([None] * (introduction.SAMPLE * 20))) == "b"
    assert [i // 20 for i in read] == list(range(introduction.SAMPLE))
    for length in (1, introduction.SAMPLE, introduction.SAMPLE + 1):
        read.clear()
        introduction.of_split(Many([None] * length))
        assert len(set(read)) == min(length, introduction.SAMPLE) and max(read) < length


def test_a_run_keeps_its_introduction(tmp_path: Path) -> None:
    workdir, best = epath.Path(tmp_path / "run"), tmp_path / "run" / "best"

    def begin(place: str, start: int = 0, *, task: bool = True) -> str | None:
        made = SimpleNamespace(introduction=introduction.of_split if task else None)
        run = SimpleNamespace(task=made, experiment=Experiment("mplug_chat_instruct", None, data=Data(path=place)))
        introductions.write(run, workdir, start)
        file = tmp_path / "run" / "introduction.txt"
        return file.read_text(encoding="utf-8") if file.exists() else None

    first, second = folder(tmp_path / "1", "看，\n答\n"), folder(tmp_path / "2", "")
    assert begin(first, task=False) is None
    assert begin(first) == "看，\n答\n" and introductions.read(workdir) == "看，\n答"
    assert begin(second, 5) == "看，\n答\n"  # a resumed run
    assert begin(second) == "\n" and introductions.read(workdir) == ""  # nothing was trained yet
    (tmp_path / "run" / "introduction.txt").unlink()  # of a version without it
    best.mkdir()
    (best / "config.json").write_text("{}")
    assert begin(first, 5) == "看，\n答\n" and introductions.read(epath.Path(best)) == "看，\n答"
    introductions.copy(epath.Path(tmp_path), workdir)
    assert introductions.read(workdir) == "看，\n答" and introductions.read(epath.Path(tmp_path)) == conversation.SYSTEM
    assert not list((tmp_path / "run").glob(".*"))


def test_data_that_cannot_be_read(tmp_path: Path) -> None:
    data = Data(path=str(tmp_path / "nowhere"))
    run = SimpleNamespace(
        task=SimpleNamespace(introduction=introduction.of_split),
        experiment=Experiment("mplug_chat_instruct", None, data=data),
    )
    with pytest.raises(PlaceFailed, match="nowhere: can no longer be read"):
        introductions.write(run, epath.Path(tmp_path), 0)
