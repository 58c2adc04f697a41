"""Mixtures: shares of every prefix, every record once per pass, changes of the weights, random batches of one folder."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import loader, mixture
from ymplug_jax.data.mixture import BatchDraws, Change, Mixed, Schedule, Stream, whole_weights
from ymplug_jax.data.source import Joined, fingerprint, folders_of, open_split, parts_of

SIZES = (7, 20, 3)
USABLE = [np.arange(7), 7 + np.arange(20), 27 + np.arange(3)]
WEIGHTS = (5, 3, 2)


def shown(order: mixture.Order, positions: range) -> np.ndarray:
    return np.array([order(p)[0] for p in positions])


def folder_of(records: np.ndarray) -> np.ndarray:
    return np.searchsorted([7, 27], records, side="right")


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.integers(0, 40), min_size=1, max_size=7).filter(any))
def test_every_prefix_has_the_shares_within_one_record(weights: list[int]):
    schedule, period = Schedule(weights), sum(weights)
    positions = np.arange(2 * period + 3)
    folders, numbers = schedule.draws(positions)
    drawn = np.cumsum(folders[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(drawn - np.outer(positions + 1, np.array(weights) / period)).max() < 1
    for folder in range(len(weights)):
        mine = numbers[folders == folder]
        np.testing.assert_array_equal(mine, np.arange(len(mine)))
    for position in (0, 1, period - 1, period, period + 2):
        expected = drawn[position - 1] if position else np.zeros(len(weights))
        np.testing.assert_array_equal(schedule.counts(position), expected)


def test_weights_become_whole_numbers():
    assert whole_weights((0.5, 0.3, 0.2), SIZES) == (5, 3, 2)
    assert whole_weights((1.0, 1.0), (4, 9)) == (1, 1)
    assert whole_weights((), (300_000, 500_000)) == (3, 5)
    assert whole_weights((0.0, 2.5), (0, 9)) == (0, 1)
    rounded = whole_weights((1 / 3, 1e-7, 2 / 3), SIZES)
    assert sum(rounded) <= mixture.PERIOD + 1 and rounded[1] == 1
    assert rounded[2] / sum(rounded) == pytest.approx(2 / 3, abs=1e-5)
    assert whole_weights((), (10_000_019, 5_000_011))[0] / mixture.PERIOD == pytest.approx(2 / 3, abs=1e-5)


@pytest.mark.parametrize(
    ("weights", "sizes", "message"),
    [
        ((1.0,), (3, 4), r"has 1 numbers, but config.data.path has 2 folders; give one for each folder"),
        ((1.0, -0.5), (3, 4), r"config.data.weights: \(1.0, -0.5\) has no meaning; give 0 or more"),
        ((0.0, 0.0), (3, 4), "has no meaning"),
        ((float("nan"), 1.0), (3, 4), "has no meaning"),
        ((float("inf"), 1.0), (3, 4), "has no meaning"),
        ((1.0, 1.0), (3, 0), "folder 2 has no record with a target"),
        ((), (3, 0), "folder 2 has no record with a target"),
        ((), (0, 0), "folder 1 has no record with a target"),
    ],
)
def test_weights_without_a_meaning_are_refused(weights: tuple, sizes: tuple, message: str):
    with pytest.raises(Mistake, match=message):
        whole_weights(weights, sizes)


def test_every_record_comes_once_per_pass_of_its_folder():
    order = Mixed(USABLE, 3, [Change(0, WEIGHTS, 0)], apart=False)
    records = shown(order, range(360))
    for folder, usable in enumerate(USABLE):
        mine = records[folder_of(records) == folder]
        passes = mine[: len(mine) // len(usable) * len(usable)].reshape(-1, len(usable))
        assert len(passes) >= 5 and all(sorted(one) == usable.tolist() for one in passes)
        assert len({tuple(one) for one in passes.tolist()}) > 1
    other = shown(Mixed(USABLE, 4, [Change(0, WEIGHTS, 0)], apart=False), range(360))
    assert (other != records).any()


def test_nothing_is_repeated_over_a_change_of_the_weights():
    changes = [Change(0, WEIGHTS, 0), Change(33, (1, 8, 1), 0), Change(33, (1, 9, 0), 0), Change(50, (1, 0, 1), 0)]
    order = Mixed(USABLE, 3, changes, apart=False)
    records = shown(order, range(160))
    np.testing.assert_array_equal(records[:33], shown(Mixed(USABLE, 3, changes[:1], apart=False), range(33)))
    for folder, usable in enumerate(USABLE):
        mine = records[folder_of(records) == folder]
        for begin in range(0, len(mine) - len(usable) + 1, len(usable)):
            assert sorted(mine[begin : begin + len(usable)]) == usable.tolist()
    assert not (folder_of(records[33:50]) == 2).any(), "a later change at the same example replaces the earlier one"
    assert np.bincount(folder_of(records[33:50]), minlength=3).tolist() in ([1, 16, 0], [2, 15, 0])
    assert not (folder_of(records[50:]) == 1).any()


def test_an_order_is_the_same_after_pickling_and_far_into_a_run():
    order = Mixed(USABLE, 3, [Change(0, WEIGHTS, 0), Change(40, (1, 1, 1), 0)], apart=False)
    copy = pickle.loads(pickle.dumps(order))
    np.testing.assert_array_equal(shown(copy, range(30, 90)), shown(order, range(30, 90)))
    far = 10**9
    stream = Stream(USABLE, 3)
    stream.change(0, Schedule(WEIGHTS))
    _, numbers = stream.folders(np.arange(far, far + 10))
    assert (np.abs(numbers - far * np.array([0.5, 0.3, 0.2])[stream.folders(np.arange(far, far + 10))[0]]) < 11).all()


def test_batches_of_one_folder_have_the_drawn_shares():
    draws = BatchDraws((3, 1), 4, seed=11, start=0)
    folders, numbers = draws.draws(np.arange(4 * 20_000))
    batches = folders.reshape(-1, 4)
    assert (batches == batches[:, :1]).all()
    share = (batches[:, 0] == 0).mean()
    assert share == pytest.approx(0.75, abs=4 * np.sqrt(0.75 * 0.25 / 20_000))
    pairs = (batches[1:, 0] == batches[:-1, 0]).mean()
    assert pairs == pytest.approx(0.75**2 + 0.25**2, abs=0.015), "batches are independent, not alternating"
    for folder in (0, 1):
        mine = numbers[folders == folder]
        np.testing.assert_array_equal(mine, np.arange(len(mine)))
        assert draws.counts(4 * 9000)[folder] == (folders[: 4 * 9000] == folder).sum()
    again = BatchDraws((3, 1), 4, seed=11, start=0).draws(np.arange(4 * 9000, 4 * 9001))
    np.testing.assert_array_equal(again[1], numbers[4 * 9000 : 4 * 9001])
    assert (BatchDraws((3, 1), 4, seed=12, start=0).draws(np.arange(400))[0] != folders[:400]).any()
    assert set(BatchDraws((0, 1), 2, seed=0, start=0).draws(np.arange(9000))[0]) == {1}


def test_batches_of_one_folder_go_on_after_changes():
    """Weights and the size of the batch change at batch borders; each folder goes on where it was."""
    changes = [Change(0, (1, 1, 0), 4), Change(40, (1, 2, 1), 4), Change(80, (1, 2, 1), 6)]
    records = shown(Mixed(USABLE, 5, changes, apart=True), range(80 + 6 * 20))
    folders = folder_of(records)
    whole = [folders[:80].reshape(-1, 4), folders[80:].reshape(-1, 6)]
    assert all((batch == batch[:, :1]).all() for batch in whole)
    for folder, usable in enumerate(USABLE):
        mine = records[folders == folder]
        for begin in range(0, len(mine) - len(usable) + 1, len(usable)):
            assert sorted(mine[begin : begin + len(usable)]) == usable.tolist()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("mixture")
    shards.write(home / "one", (5, 4))
    shards.write(home / "two", (6,), first=50)
    return f"{home / 'one'}, {home / 'two'}"


def test_folders_are_read_one_after_the_other(path: str):
    records = open_split(path, "train")
    assert isinstance(records, Joined) and len(records) == 15 and [len(part) for part in parts_of(records)] == [9, 6]
    assert [records[i].media_id for i in (0, 8, 9, 14)] == [f"videos/{i}.mp4" for i in (0, 8, 50, 55)]
    assert records.kind == "pretrain"
    with pytest.raises(IndexError, match="has 15 records"):
        records[15]
    one, two = (fingerprint(part) for part in parts_of(records))
    assert one != two and one == fingerprint(open_split(folders_of(path)[0], "train"))
    assert parts_of(open_split(folders_of(path)[0], "train"))[0].path == folders_of(path)[0]


def test_wrong_lists_of_folders_are_refused():
    with pytest.raises(Mistake, match="has an empty name between commas"):
        folders_of("a,,b")
    with pytest.raises(Mistake, match="names a twice; name it once, with a larger weight"):
        folders_of("a/,b,a")


def number(record, rng) -> dict[str, np.ndarray]:
    return {"number": np.int32(record.media_id.split("/")[1].split(".")[0]), "draw": np.float64(rng.random())}


def test_the_loader_gives_the_same_examples_on_any_number_of_hosts(path: str):
    records = open_split(path, "train")
    order = Mixed([np.arange(9), 9 + np.arange(6)], 7, [Change(0, (1, 2), 0), Change(20, (2, 1), 0)], apart=False)

    def take(rows: range, start: int, count: int) -> dict[str, np.ndarray]:
        stream = loader.batches(
            records,
            number,
            seed=7,
            batch_size=8,
            rows=rows,
            start=start,
            shuffle=True,
            threads=2,
            order=order,
        )
        got = [next(stream) for _ in range(count)]
        stream.close()
        return {key: np.stack([batch[key] for batch in got]) for key in got[0]}

    whole = take(range(8), 0, 6)
    expected = [number(records[order(p)[0]], np.random.default_rng((7, p))) for p in range(48)]
    np.testing.assert_array_equal(whole["number"].reshape(-1), [one["number"] for one in expected])
    np.testing.assert_array_equal(whole["draw"].reshape(-1), [one["draw"] for one in expected])
    for hosts in (2, 4):
        share = 8 // hosts
        parts = [take(range(h * share, (h + 1) * share), 16, 4) for h in range(hosts)]
        for key in whole:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts], axis=1), whole[key][2:])
