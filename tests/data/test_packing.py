"""Packing: nothing above the capacity, no record lost, full examples, and a position that is found without reading records."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shards
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import loader, measuring
from ymplug_jax.data.mixture import Change
from ymplug_jax.data.packing import Packed, Size, pack
from ymplug_jax.data.records import CorruptRecord, Records
from ymplug_jax.data.source import open_split

ROOM = Size(32, 2, 1)


def sizes_of(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    media = rng.multinomial(1, (0.4, 0.3, 0.3), count)[:, 1:]
    return np.concatenate([rng.integers(1, 20, (count, 1)), media], axis=1).astype(np.int32)


SIZES = sizes_of(300)
USABLE = [np.arange(0, 120), np.arange(120, 280), np.arange(280, 300)]


def packed(seed: int = 5, changes: tuple[Change, ...] = (Change(0, (1, 2, 1), 0),), window: int = 16) -> Packed:
    return Packed(USABLE, SIZES, ROOM, seed, changes, window)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 32), st.integers(0, 2), st.integers(0, 1)), max_size=60),
    room=st.sampled_from([ROOM, Size(40, 5, 3), Size(32, 2, 1)]),
)
def test_no_record_is_lost_and_no_example_too_large(sizes: list[tuple[int, int, int]], room: Size):
    array = np.array(sizes, np.int32).reshape(-1, 3)
    examples = pack(array, room)
    assert sorted(i for example in examples for i in example) == list(range(len(sizes)))
    for example in examples:
        assert (array[example].sum(axis=0) <= room).all() and example == sorted(example)


def test_best_fit_decreasing_by_hand():
    tokens = np.array([5, 7, 3, 5, 2, 8], np.int32)
    sizes = np.stack([tokens, np.zeros_like(tokens), np.zeros_like(tokens)], axis=1)
    # 8 | 7 | 5 5, then 3 joins 7 (3 left), 2 joins 8 (2 left)
    assert pack(sizes, Size(10, 0, 0)) == [[4, 5], [1, 2], [0, 3]]
    media = np.array([[2, 1, 0], [2, 1, 0], [2, 0, 1], [9, 0, 0]], np.int32)
    assert pack(media, Size(10, 1, 1)) == [[0, 2], [1], [3]]  # an image each; the clip joins the first image


@pytest.mark.parametrize(
    ("name", "room", "least"),
    [("answers", Size(2048, 8, 4), 0.98), ("images", Size(2048, 16, 0), 0.96), ("titles", Size(256, 0, 2), 0.9)],
)
def test_examples_of_realistic_lengths_are_full(name: str, room: Size, least: float):
    """Log-normal lengths with 65 slots per medium: more than nine tenths of an example are filled if media do not limit it."""
    rng = np.random.default_rng(1)
    tokens = np.clip(rng.lognormal({"answers": 5.0, "images": 4.5, "titles": 3.2}[name], 0.8, 4096), 8, room.tokens)
    media = rng.multinomial(
        1, {"answers": (0.5, 0.4, 0.1), "images": (0.5, 0.5, 0), "titles": (0.8, 0, 0.2)}[name], 4096
    )
    lengths = np.minimum(tokens + 65 * media[:, 1:].sum(axis=1), room.tokens).astype(int)
    sizes = np.stack([lengths, media[:, 1], media[:, 2]], axis=1)
    filled = [
        sizes[begin : begin + 1024, 0].sum() / len(pack(sizes[begin : begin + 1024], room)) / room.tokens
        for begin in range(0, 4096, 1024)
    ]
    print(name, [f"{share:.4f}" for share in filled])
    assert min(filled) > least


def test_every_record_of_the_stream_is_in_one_example():
    order, plain = packed(), packed(window=1)
    records = [record for example in range(order.examples_in(16 * 50)) for record in order(example)]
    stream = [plain(i)[0] for i in range(16 * 50)]  # windows of one record: the stream itself
    assert sorted(records) == sorted(stream) and records != stream
    for example in range(order.examples_in(16 * 50)):
        assert (SIZES[list(order(example))].sum(axis=0) <= ROOM).all()
    for folder, usable in enumerate(USABLE):
        mine = [record for record in stream if usable[0] <= record <= usable[-1]]
        assert sorted(mine[: len(usable)]) == usable.tolist(), f"folder {folder} is drawn once before it is repeated"


def test_any_example_is_found_from_scratch():
    order = packed()
    whole = [order(i) for i in range(200)]
    for i in (0, 1, 57, 199, 58):
        assert packed()(i) == whole[i]
    copy = pickle.loads(pickle.dumps(order))
    fresh, other = packed(), packed(seed=6)
    assert [copy(i) for i in range(190, 230)] == [fresh(i) for i in range(190, 230)]
    assert [other(i) for i in range(20)] != whole[:20]
    assert order.examples_in(0) == 0 and order.examples_in(16) + 1 <= order.examples_in(33)
    assert order.examples_in(21) == order.examples_in(16) + len(pack(SIZES[order._records(1)[:5]], ROOM))


def test_new_weights_begin_with_the_next_window_and_lose_nothing():
    first = Change(0, (1, 2, 1), 0)
    old = packed()
    border = old.examples_in(16 * 3)  # first example of window 3
    for start in (border, border + 1, border + 2):
        changed = packed(changes=(first, Change(start, (0, 1, 0), 0)))
        windows = 3 if start == border else 4
        end = old.examples_in(16 * windows)
        assert [changed(i) for i in range(end)] == [old(i) for i in range(end)]
        after = [record for i in range(end, end + 70) for record in changed(i)]
        assert all(120 <= record < 280 for record in after)
        before = [record for i in range(end) for record in old(i) if 120 <= record < 280]
        # The folder goes on where it was: no record comes twice before all 160 have come.
        whole = (160 - len(before)) // 16  # windows within the first pass over the folder
        ends = [changed.examples_in(16 * (windows + count)) for count in (whole, whole + 1)]
        once, all_of_it = (before + [record for i in range(end, last) for record in changed(i)] for last in ends)
        assert len(set(once)) == len(once) == len(before) + 16 * whole
        assert set(all_of_it) == set(range(120, 280))
    twice = packed(changes=(first, Change(border + 1, (1, 0, 0), 0), Change(border + 2, (0, 1, 0), 0)))
    assert [twice(i) for i in range(end + 30)] == [changed(i) for i in range(end + 30)]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return Records(str(shards.write(tmp_path_factory.mktemp("packed"), (90, 60))), "train")


def number_of(record) -> int:
    return int(record.media_id.split("/")[1].split(".")[0])


def size_of(record) -> Size:
    number = number_of(record)
    return Size(0 if number % 10 == 0 else 1 + number % 7, number % 2, 0)


def several(found, rng) -> dict[str, np.ndarray]:
    row = np.full(8, -1)
    row[: len(found)] = [number_of(record) for record in found]
    return {"numbers": row, "draw": np.float64(-1 if rng is None else rng.random())}


def take(records: Records, order: Packed, rows: range, start: int, count: int, **more) -> list[dict[str, np.ndarray]]:
    options = {"seed": 3, "batch_size": 4, "shuffle": True, "threads": 2, "order": order, "packed": True}
    stream = loader.batches(records, several, rows=rows, start=start, **(options | more))
    got = [next(stream) for _ in range(count)]
    stream.close()
    return got


def measured_order(records: Records, **more) -> Packed:
    sizes = measuring.measure(records, size_of, threads=2, **more)
    np.testing.assert_array_equal(sizes, [size_of(records[i]) for i in range(150)])
    return Packed([np.flatnonzero(sizes[:, 0] > 0)], sizes, Size(12, 3, 0), 3, [Change(0, (1,), 0)], window=32)


def test_records_are_measured_and_packed_by_the_loader(records: Records):
    order = measured_order(records)
    whole = take(records, order, range(4), 0, 10)
    for number, batch in enumerate(whole):
        for row in range(4):
            got = batch["numbers"][row]
            assert tuple(got[got >= 0]) == order(4 * number + row)
    parts = [take(records, order, range(2 * host, 2 * host + 2), 12, 7) for host in (0, 1)]
    for key in ("numbers", "draw"):
        both = [np.concatenate([one[key], other[key]]) for one, other in zip(*parts, strict=True)]
        np.testing.assert_array_equal(both, [batch[key] for batch in whole[3:]])
    single = take(records, order, range(4), 0, 2, shuffle=False)
    assert single[1]["numbers"][:, 0].tolist() == [4, 5, 6, 7] and (single[1]["numbers"][:, 1:] == -1).all()


@pytest.mark.slow
def test_worker_processes_measure_and_pack_alike(records: Records):
    order = measured_order(records, workers=1)
    (want,), (got,) = (take(records, order, range(4), 20, 1, workers=workers) for workers in (0, 2))
    for key in want:
        np.testing.assert_array_equal(got[key], want[key])


def test_damaged_and_too_large_records(records: Records, tmp_path):
    folder = shards.write(tmp_path / "damaged", (9,))
    file = next(folder.glob("*.tfrecord-00000-of-00001"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    broken = open_split(str(folder), "train")
    with pytest.raises(CorruptRecord, match="wrong checksum"):
        measuring.measure(broken, size_of, threads=2)
    sizes = measuring.measure(broken, size_of, threads=2, skip_corrupt=True)
    assert (sizes[:, 0] == measuring.UNREADABLE).sum() == 1 and len(sizes) == 9
    sizes = measuring.measure(records, size_of, threads=2)
    measuring.check_room(sizes, Size(7, 1, 0), records)
    with pytest.raises(Mistake, match=r"videos/5.mp4: one of 38 records that are larger .*up to 7 tokens, 1 images"):
        measuring.check_room(sizes, Size(5, 1, 0), records)
