"""Device prefetch: order, errors, end and depth."""

import threading
from collections.abc import Iterator

import pytest

from ymplug_jax.data.prefetch import Feed


class Stream:
    """Stream of numbers with `skipped` ten times the number. Can wait for a semaphore before each batch, and can fail."""

    def __init__(self, count: int, breaks_at: int | None = None, leave: threading.Semaphore | None = None):
        self.skipped, self.closed = 0, False
        self._numbers = self._run(count, breaks_at, leave)

    def _run(self, count: int, breaks_at: int | None, leave: threading.Semaphore | None) -> Iterator[int]:
        for number in range(count):
            if leave is not None:
                leave.acquire()
            if number == breaks_at:
                raise OSError("the disk is gone")
            self.skipped = 10 * number
            yield number

    def __iter__(self) -> Iterator[int]:
        return self._numbers

    def close(self) -> None:
        self._numbers.close()
        self.closed = True


def test_every_batch_in_order_and_the_end():
    stream = Stream(20)
    feed = Feed(stream, lambda number: number + 100)
    got = [(next(feed), feed.skipped) for _ in range(20)]
    assert got == [(100 + i, 10 * i) for i in range(20)], "counts are those of the batch in hand, not of what is ahead"
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(feed)
    feed.close()
    assert stream.closed


def test_two_batches_are_prefetched():
    """Without a consumer, exactly two transfers start."""
    put, second = [], threading.Event()

    def record(number: int) -> int:
        put.append(number)
        if len(put) == 2:
            second.set()
        return number

    feed = Feed(Stream(10), record)
    assert second.wait(20)
    feed._thread.join(0.2)
    assert put == [0, 1]
    assert next(feed) == 0
    feed.close()


def test_a_late_batch_does_not_hold_back_one_that_is_ready():
    leave = threading.Semaphore(2)  # the third batch is late
    feed = Feed(Stream(5, leave=leave), lambda number: number)
    assert (next(feed), next(feed)) == (0, 1)
    leave.release()
    assert next(feed) == 2
    leave.release(5)
    feed.close()


@pytest.mark.parametrize("where", ["stream", "put"])
def test_errors_are_raised_at_their_batch(where: str):
    def put(number: int) -> int:
        if where == "put" and number == 3:
            raise OSError("the disk is gone")
        return number

    feed = Feed(Stream(9, breaks_at=3 if where == "stream" else None), put)
    assert [next(feed) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(feed)
    feed.close()


def test_closing_stops_the_thread_in_any_state():
    for taken in (0, 1, 3):
        stream = Stream(100)
        feed = Feed(stream, lambda number: number)
        for _ in range(taken):
            next(feed)
        feed.close()
        assert stream.closed and not feed._thread.is_alive()
