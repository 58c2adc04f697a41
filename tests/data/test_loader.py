"""Global batches depend on (seed, position) only, not on hosts, threads, workers or interruptions."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from ymplug_jax.data import loader, schema
from ymplug_jax.data.records import CorruptRecord, Record, Records

SIZE = 8  # size of the global batch


def example(record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """Make an example of the record's number and a random draw."""
    number = int(record.media_id.split("/")[1].split(".")[0])
    return {"number": np.int32(number), "draw": np.float64(-1 if rng is None else rng.random())}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return Records(str(shards.write(tmp_path_factory.mktemp("clips"), (9, 8, 4))), "train")


def stream_of(records: Records, make=example, **options) -> loader.Batches:
    defaults = {"seed": 7, "batch_size": SIZE, "rows": range(SIZE), "shuffle": True, "threads": 2}
    return loader.batches(records, make, **(defaults | options))


def take(records: Records, count: int, **options) -> dict[str, np.ndarray]:
    """Return the first batches, stacked: [count, len(rows)]."""
    stream = stream_of(records, **options)
    got = [next(stream) for _ in range(count)]
    stream.close()
    return {key: np.stack([batch[key] for batch in got]) for key in got[0]}


def threads_there() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("grain-prefetch", "loader"))]


def threads_end() -> bool:
    """Wait up to 20 seconds for the threads to end; return whether they did."""
    deadline = time.monotonic() + 20
    while threads_there() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not threads_there()


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_same_batches_on_any_number_of_hosts(records: Records, hosts: int):
    whole = take(records, 6)
    share = SIZE // hosts
    parts = [take(records, 6, rows=range(h * share, (h + 1) * share)) for h in range(hosts)]
    for key in whole:
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts], axis=1), whole[key])


def test_any_rows_in_any_order(records: Records):
    rows = [6, 1, 1, 3]
    whole, part = take(records, 3), take(records, 3, rows=np.array(rows))
    for key in whole:
        np.testing.assert_array_equal(part[key], whole[key][:, rows])


@pytest.mark.parametrize("seen", [8, 16, 24, 5, 21 * 1000 + 3])
def test_resume_from_one_integer(records: Records, seen: int):
    """Resuming works with any batch size, since the order is over positions, and takes no longer deep in a run."""
    rest = take(records, 2, start=seen)
    one = [take(records, 1, start=seen + k, batch_size=1, rows=[0]) for k in range(2 * SIZE)]
    for key in rest:
        np.testing.assert_array_equal(rest[key].reshape(-1), [part[key].item() for part in one])
    if seen < 48:
        whole = take(records, 6)
        for key in whole:
            np.testing.assert_array_equal(rest[key].reshape(-1), whole[key].reshape(-1)[seen : seen + 2 * SIZE])


def test_every_epoch_is_another_permutation(records: Records):
    numbers = take(records, 21)["number"].reshape(-1)
    epochs = numbers.reshape(8, 21)
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 8
    assert len(set(take(records, 21)["draw"].reshape(-1).tolist())) == 168, "the same clip is augmented anew"


def test_other_seeds_give_other_orders(records: Records):
    """In particular, epoch 1 of a seed is not epoch 0 of the next seed."""
    orders = {
        tuple(take(records, 21, seed=seed)["number"].reshape(8, 21)[e]) for seed in (7, 8, 2**40) for e in range(8)
    }
    assert len(orders) == 24


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 10**6))
def test_order_of_any_size(size: int, batch: int, seed: int, epoch: int):
    """Every epoch is a permutation, for any length, start and batch size."""

    class Few:
        path, split = "memory", "train"

        def __len__(self) -> int:
            return size

        def __getitem__(self, i: int) -> Record:
            return Record(f"videos/{i}.mp4", [], np.zeros(0), "", [], "", -1)

    stream = stream_of(Few(), seed=seed, start=epoch * size, batch_size=batch, rows=range(batch), threads=1)
    got = np.concatenate([next(stream)["number"] for _ in range(-(-size // batch))])[:size]
    stream.close()
    assert sorted(got.tolist()) == list(range(size))


@pytest.mark.parametrize("threads", [1, 5])
def test_threads_change_nothing(records: Records, threads: int):
    np.testing.assert_array_equal(take(records, 4, threads=threads)["draw"], take(records, 4)["draw"])


def break_record(folder: Path, shard: int, shards_there: int, number: int) -> None:
    """Flip a bit of a record's payload."""
    file = folder / schema.shard_name("clips", "train", shard, shards_there)
    data = bytearray(file.read_bytes())
    data[np.load(file.with_name(file.name + schema.INDEX_SUFFIX))[number, 0] + 300] ^= 1
    file.write_bytes(data)


@pytest.fixture
def broken(tmp_path: Path) -> Records:
    """A data set whose record 3 has a flipped bit."""
    shards.write(tmp_path, (9, 7))
    break_record(tmp_path, 0, 2, 3)
    return Records(str(tmp_path), "train")


def test_worker_processes_change_nothing(broken: Records):
    """Batches and counts of corrupt records do not depend on the number of workers.

    Workers need parsed flags and a main module, so the test runs a script.
    """
    code = f"""
import json, multiprocessing, sys
from absl import app
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
def main(_):
    import test_loader
    from ymplug_jax.data.records import Records
    records = Records({broken.path!r}, "train")
    for workers in (1, 3):
        stream = test_loader.stream_of(records, workers=workers, skip_corrupt=True)
        got = [next(stream) for _ in range(4)]
        counted = stream.skipped
        stream.close()
        columns = {{key: [batch[key].tolist() for batch in got] for key in ("draw", "valid")}}
        print(json.dumps(columns | {{"skipped": counted, "alive": len(multiprocessing.active_children())}}))
    stream = test_loader.stream_of(records, workers=1)
    try:
        for _ in range(4): next(stream)
    except test_loader.CorruptRecord as error:
        print(json.dumps(str(error)))
    next(test_loader.stream_of(records, workers=1, skip_corrupt=True))  # left open: the process must still exit
if __name__ == "__main__":
    app.run(main)
"""
    script = Path(broken.path) / "workers.py"
    script.write_text(code)
    # Its decoding processes import the package before the script puts it on the path.
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, env=env)
    assert out.returncode == 0, out.stderr
    one, three, error = (json.loads(line) for line in out.stdout.splitlines())
    want = take(broken, 4, skip_corrupt=True)
    for got in (one, three):
        assert got == {"draw": want["draw"].tolist(), "valid": want["valid"].tolist(), "skipped": 2, "alive": 0}
    assert error.startswith(f"{broken.path}/clips-train.tfrecord-00000-of-00002: record 3 at byte ")


def test_evaluation_is_one_pass_in_order_with_padding(records: Records):
    stream = stream_of(records, shuffle=False)
    got = list(stream)
    numbers, valid = (np.concatenate([batch[key] for batch in got]) for key in ("number", "valid"))
    assert len(got) == 3 and numbers[valid].tolist() == list(range(21)) and valid.sum() == 21
    assert valid.dtype == bool and not valid[21:].any() and stream.skipped == 0
    assert all((batch["draw"] == -1).all() for batch in got)
    assert list(stream) == [] and threads_end()


def test_evaluation_gives_every_host_the_same_number_of_batches(records: Records):
    parts = [list(stream_of(records, shuffle=False, rows=[h], num_examples=10)) for h in range(SIZE)]
    assert {len(part) for part in parts} == {2}
    valid = [(batch["number"][0], batch["valid"][0]) for part in parts for batch in part]
    assert sorted(number for number, ok in valid if ok) == list(range(10))
    more = list(stream_of(records, shuffle=False, num_examples=1000))
    assert sum(int(batch["valid"].sum()) for batch in more) == 21 and len(more) == 3


def test_evaluation_can_start_at_a_position(records: Records):
    got = list(stream_of(records, shuffle=False, start=16))
    assert [batch["number"][batch["valid"]].tolist() for batch in got] == [[16, 17, 18, 19, 20]]
    assert list(stream_of(records, shuffle=False, start=24)) == []


def test_corrupt_record_raises_with_shard_and_offset(broken: Records):
    stream = stream_of(broken)
    with pytest.raises(CorruptRecord, match=r"tfrecord-00000-of-00002: record 3 at byte [0-9]+: wrong checksum"):
        list(islice(stream, 2))
    assert threads_end(), "an error leaves no threads"
    with pytest.raises(StopIteration):
        next(stream)


@pytest.mark.parametrize("hosts", [1, 4])
def test_corrupt_records_are_skipped_alike_on_all_hosts(broken: Records, hosts: int):
    share = SIZE // hosts
    parts = [take(broken, 4, rows=range(h * share, (h + 1) * share), skip_corrupt=True) for h in range(hosts)]
    valid = np.concatenate([part["valid"] for part in parts], axis=1)
    numbers = np.concatenate([part["number"] for part in parts], axis=1)
    assert valid.sum() == 4 * SIZE - 2, "two epochs, one bad record each"
    assert 3 not in numbers[valid]
    np.testing.assert_array_equal(numbers[valid], take(broken, 4, skip_corrupt=True)["number"][valid])


def test_skipped_records_are_counted(broken: Records):
    """Neither padding nor prefetched records are counted."""
    stream = stream_of(broken, batch_size=6, rows=range(6), shuffle=False, skip_corrupt=True)
    counts = [(stream.skipped, int(batch["valid"].sum())) for batch in stream]
    assert counts == [(1, 5), (1, 6), (1, 4)]


def test_the_first_record_may_be_the_corrupt_one(tmp_path: Path):
    """Invalid examples are filled with the first readable record."""
    shards.write(tmp_path, (2, 1))
    break_record(tmp_path, 0, 2, 0)
    batch = next(stream_of(Records(str(tmp_path), "train"), shuffle=False, skip_corrupt=True))
    assert batch["number"].tolist() == [1, 1, 2, 1, 1, 1, 1, 1]
    assert batch["valid"].tolist() == [False, True, True] + [False] * 5
    break_record(tmp_path, 0, 2, 1)
    break_record(tmp_path, 1, 2, 0)
    with pytest.raises(CorruptRecord, match="every record of split 'train' is corrupt"):
        next(stream_of(Records(str(tmp_path), "train"), shuffle=False, skip_corrupt=True))


def test_an_error_of_the_task_names_the_record(records: Records):
    def fails(record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        if record.media_id == "videos/4.mp4":
            raise KeyError("title")
        return example(record, rng)

    with pytest.raises(KeyError) as caught:
        list(stream_of(records, fails, shuffle=False))
    assert any(f"record 4 of {records.path}, split 'train': videos/4.mp4" in note for note in caught.value.__notes__)


def test_prefetch_depth(records: Records):
    """The loader prefetches two batches, and reads nothing before the first request."""
    made = []

    def counted(record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        made.append(record.media_id)
        return example(record, rng)

    stream = stream_of(records, counted)
    time.sleep(0.2)
    assert not made
    next(stream)
    deadline = time.monotonic() + 20
    while len(made) < 3 * SIZE and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert len(made) == 3 * SIZE
    stream.close()


def test_closing_ends_the_threads(records: Records):
    before = set(multiprocessing.active_children())  # other tests of this process may have left processes
    stream = stream_of(records)
    next(stream)
    assert threads_there()
    stream.close()
    assert threads_end() and not set(multiprocessing.active_children()) - before
    stream_of(records).close()  # before the first batch


def test_an_open_stream_does_not_keep_a_program_alive(records: Records):
    code = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
import test_loader
stream = test_loader.stream_of(test_loader.Records({records.path!r}, "train"))
next(stream)
raise SystemExit("the end")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.returncode == 1 and out.stderr.strip().splitlines()[-1] == "the end"


@pytest.mark.parametrize("rows", [[], [8], [-1, 2]])
def test_rows_outside_the_batch(records: Records, rows: list[int]):
    with pytest.raises(ValueError, match=r"give rows from 0 to 7"):
        stream_of(records, rows=rows)


def test_a_split_without_records(tmp_path: Path):
    with pytest.raises(ValueError, match="split 'train' has no records"):
        stream_of(Records(str(shards.write(tmp_path, (0, 0))), "train"))


def test_no_tensorflow_behind_the_loader():
    code = (
        "import sys, ymplug_jax.data.loader, ymplug_jax.data.transforms, ymplug_jax.data.frames, ymplug_jax.data.text\n"
        "print({'tensorflow', 'apache_beam', 'av', 'torch'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
