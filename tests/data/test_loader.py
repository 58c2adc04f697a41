"""The global batches depend on (seed, position) only: not on hosts, threads, workers or where a run was cut."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import shards
from ymplug_jax.data import loader, schema
from ymplug_jax.data.records import CorruptRecord, Record, Records

SIZE = 8  # of the global batch


def example(record: Record, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
    """Number of the record, and a draw that shows the randomness it was given."""
    number = int(record.media_id.split("/")[1].split(".")[0])
    return {"number": np.int32(number), "draw": np.float64(-1 if rng is None else rng.random())}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return Records(str(shards.write(tmp_path_factory.mktemp("clips"), (9, 8, 4))), "train")


def take(records: Records, count: int, rows=range(SIZE), **options) -> dict[str, np.ndarray]:
    """The first batches, stacked: [count, len(rows)]."""
    stream = loader.batches(
        records, example, **({"seed": 7, "batch_size": SIZE, "rows": rows, "shuffle": True, "threads": 2} | options)
    )
    got = [next(stream) for _ in range(count)]
    stream.close()
    return {key: np.stack([batch[key] for batch in got]) for key in got[0]}


@pytest.mark.parametrize("hosts", [2, 4, 8])
def test_same_batches_on_any_number_of_hosts(records: Records, hosts: int):
    whole = take(records, 6)
    share = SIZE // hosts
    parts = [take(records, 6, rows=range(h * share, (h + 1) * share)) for h in range(hosts)]
    for key in whole:
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts], axis=1), whole[key])


@pytest.mark.parametrize("seen", [8, 16, 24, 5])
def test_resume_from_one_integer(records: Records, seen: int):
    whole = {key: value.reshape(-1) for key, value in take(records, 6).items()}
    rest = take(records, 2, start=seen)
    for key in whole:
        np.testing.assert_array_equal(rest[key].reshape(-1), whole[key][seen : seen + 2 * SIZE])


def test_every_epoch_is_another_permutation(records: Records):
    numbers = take(records, 21)["number"].reshape(-1)
    epochs = numbers.reshape(8, 21)
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 8
    assert len(set(take(records, 21)["draw"].reshape(-1).tolist())) == 168, "the same clip is augmented anew"
    assert not np.array_equal(take(records, 2, seed=8)["number"], take(records, 2)["number"])


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 5}, {"workers": 1}, {"workers": 2}])
def test_threads_and_workers_change_nothing(records: Records, options: dict[str, int]):
    """Worker processes need flags parsed and a main module: run where a user would, in a script."""
    if "workers" not in options:
        np.testing.assert_array_equal(take(records, 4, **options)["draw"], take(records, 4)["draw"])
        return
    code = f"""
import sys
from absl import app
def main(_):
    sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parent.parent)]!r}
    import test_loader
    from ymplug_jax.data.records import Records
    got = test_loader.take(Records({records.path!r}, "train"), 4, workers={options["workers"]})
    print(got["number"].tolist(), got["draw"].tolist())
if __name__ == "__main__":
    app.run(main)
"""
    script = Path(records.path) / f"workers{options['workers']}.py"
    script.write_text(code)
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    want = take(records, 4)
    assert out.stdout.strip() == f"{want['number'].tolist()} {want['draw'].tolist()}"


def test_evaluation_is_one_pass_in_order_with_padding(records: Records):
    got = list(loader.batches(records, example, seed=0, batch_size=SIZE, rows=range(SIZE), shuffle=False, threads=2))
    numbers, valid = (np.concatenate([batch[key] for batch in got]) for key in ("number", "valid"))
    assert len(got) == 3 and numbers[valid].tolist() == list(range(21)) and valid.sum() == 21
    assert all((batch["draw"] == -1).all() for batch in got)


def test_evaluation_gives_every_host_the_same_number_of_batches(records: Records):
    parts = [
        list(
            loader.batches(
                records, example, seed=0, batch_size=SIZE, rows=[h], shuffle=False, num_examples=10, threads=1
            )
        )
        for h in range(SIZE)
    ]
    assert {len(part) for part in parts} == {2}
    valid = [(batch["number"][0], batch["valid"][0]) for part in parts for batch in part]
    assert sorted(number for number, ok in valid if ok) == list(range(10))


@pytest.fixture
def broken(tmp_path: Path) -> Records:
    """Record 3 has a flipped bit."""
    shards.write(tmp_path, (9, 7))
    file = tmp_path / schema.shard_name("clips", "train", 0, 2)
    data = bytearray(file.read_bytes())
    data[np.load(file.with_name(file.name + schema.INDEX_SUFFIX))[3, 0] + 300] ^= 1
    file.write_bytes(data)
    return Records(str(tmp_path), "train")


def test_a_corrupt_record_stops_with_its_place(broken: Records):
    with pytest.raises(CorruptRecord, match="tfrecord-00000-of-00002: record 3 at byte"):
        take(broken, 2)


@pytest.mark.parametrize("hosts", [1, 4])
def test_a_corrupt_record_can_be_skipped_the_same_way_everywhere(broken: Records, hosts: int):
    share = SIZE // hosts
    parts = [take(broken, 4, rows=range(h * share, (h + 1) * share), skip_corrupt=True) for h in range(hosts)]
    valid = np.concatenate([part["valid"] for part in parts], axis=1)
    numbers = np.concatenate([part["number"] for part in parts], axis=1)
    assert valid.sum() == 4 * SIZE - 2, "two epochs, one bad record each"
    assert 3 not in numbers[valid]
    np.testing.assert_array_equal(numbers[valid], take(broken, 4, skip_corrupt=True)["number"][valid])


def test_skipped_records_are_counted(broken: Records):
    stream = loader.batches(
        broken, example, seed=7, batch_size=SIZE, rows=range(SIZE), shuffle=False, threads=1, skip_corrupt=True
    )
    assert sum(int(batch["valid"].sum()) for batch in stream) == 15
    assert stream.skipped == 1


def test_no_tensorflow_behind_the_loader():
    code = "import sys, ymplug_jax.data.loader; print('tensorflow' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
