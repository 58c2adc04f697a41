"""Memory that is used again: only after everything that refers to it is gone."""

import threading

import numpy as np

from ymplug_jax.data import loader
from ymplug_jax.data.buffers import RESULTS, Arrays, Scratch


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_an_array_is_given_out_again_when_nobody_has_it():
    arrays = Arrays(keep=4)
    first = arrays.empty((3, 5), np.int32)
    place = address(first)
    assert first.shape == (3, 5) and first.dtype == np.int32
    assert address(arrays.empty((3, 5), np.int32)) != place, "still held"
    del first
    assert address(arrays.empty((3, 5), np.int32)) == place


def test_views_and_buffers_hold_an_array():
    arrays = Arrays(keep=4)
    for keep in (
        lambda a: a[1:],
        lambda a: a.T[0][:2],
        lambda a: memoryview(a),
        lambda a: [{"x": a}],
        lambda a: a.view(np.uint8),
    ):
        array = arrays.empty((4, 4), np.float32)
        place, kept = address(array), keep(array)
        del array
        other = arrays.empty((4, 4), np.float32)
        assert address(other) != place
        del kept, other


def test_other_shapes_and_dtypes_are_other_arrays():
    arrays = Arrays(keep=4)
    place = address(arrays.empty((8,), np.uint8))
    assert arrays.empty((4, 2), np.uint8).shape == (4, 2)
    assert arrays.empty((8,), np.int8).dtype == np.int8
    assert address(arrays.empty([8], "uint8")) == place


def test_no_more_than_keep_are_remembered():
    arrays = Arrays(keep=2)
    held = [arrays.empty((8,), np.uint8) for _ in range(5)]
    assert len({address(array) for array in held}) == 5
    kept = {address(array) for array in held[-2:]}
    del held
    assert {address(array) for array in (arrays.empty((8,), np.uint8), arrays.empty((8,), np.uint8))} == kept


def test_threads_never_share_an_array():
    arrays, wrong = Arrays(keep=16), []

    def work(number: int) -> None:
        for _ in range(400):
            array = arrays.empty((64,), np.int64)
            array[:] = number
            if (array != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_scratch_belongs_to_a_thread():
    scratch, found = Scratch(), []
    mine = scratch.empty("x", (2, 3), np.float32)
    assert address(scratch.empty("x", (5,), np.uint8)) == address(mine), "smaller: the same memory"
    assert scratch.empty("x", (100,), np.float64).size == 100
    assert address(scratch.empty("y", (2, 3), np.float32)) != address(scratch.empty("x", (2, 3), np.float32))
    thread = threading.Thread(target=lambda: found.append(address(scratch.empty("x", (2, 3), np.float32))))
    thread.start()
    thread.join()
    assert found[0] != address(scratch.empty("x", (2, 3), np.float32))


class Twins:
    """Examples of two arrays of one shape, made one after the other; which is stored under which name alternates."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, k: int) -> dict[str, np.ndarray]:
        first, second = RESULTS.empty((8,), np.int64), RESULTS.empty((8,), np.int64)
        first[:], second[:] = k, -k
        return {"a": first, "b": second} if k % 2 else {"a": second, "b": first}


def test_examples_made_in_a_batch_are_what_they_would_be_elsewhere():
    """Results taken from the batch's own memory never overwrite one another, nor batches that are still in use."""
    batches = list(loader.in_threads(Twins(), 4, 3))
    for number, batch in enumerate(batches):
        for row in range(4):
            k = 4 * number + row
            sign = 1 if k % 2 else -1
            assert (batch["a"][row] == sign * k).all() and (batch["b"][row] == -sign * k).all()


def test_memory_on_offer_is_taken_once_and_only_if_it_fits():
    row = np.empty((4,), np.uint8)
    RESULTS.offer(row)
    assert RESULTS.empty((5,), np.uint8) is not row and RESULTS.empty((4,), np.int8) is not row
    assert RESULTS.empty((4,), np.uint8) is row and RESULTS.empty((4,), np.uint8) is not row
    RESULTS.offer(row)
    RESULTS.offer(None)
    assert RESULTS.empty((4,), np.uint8) is not row
