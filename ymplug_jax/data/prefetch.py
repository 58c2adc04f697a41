"""Prefetching of batches to the devices while the train step runs."""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, TypeVar

from ymplug_jax.data.loader import Example

Batch = TypeVar("Batch")


class Stream(Protocol):
    """Iterator over this host's rows of the batches: `loader.Batches`, or a substitute with its interface."""

    @property
    def skipped(self) -> int:
        """Number of corrupt records in the batches returned so far."""
        ...

    def __iter__(self) -> Iterator[Example]: ...

    def close(self) -> None:
        """Stop the threads and processes."""
        ...


class Feed(Generic[Batch]):
    """Transfers batches to the devices, two ahead of the consumer, in its own thread.

    Because of the separate thread, the training loop never waits for a late batch or its transfer while another batch is ready.
    """

    def __init__(self, stream: Stream, put: Callable[[Example], Batch]):
        """Start reading.

        Args:
          stream: batches of this host's rows. Closed together with the feed.
          put: starts the transfer of a batch to the devices. Called in the feed's thread.
        """
        self.skipped = 0  # number of corrupt records in the batches returned so far
        self._stream, self._put = stream, put
        self._ready: queue.Queue[tuple[Batch, int] | BaseException] = queue.Queue(1)  # the thread holds one more
        self._closed = False
        self._thread = threading.Thread(target=self._read_ahead, name="feed", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        """Return the next batch. Re-raises errors of the stream and of `put`.

        Raises:
          StopIteration: the stream has ended.
        """
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # for the next call
            raise item
        batch, self.skipped = item
        return batch

    def close(self) -> None:
        """Stop the thread after its current batch, and close the stream."""
        self._closed = True
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()  # the thread may be blocked on a full queue
            self._thread.join(0.01)
        self._stream.close()

    def _read_ahead(self) -> None:
        try:
            for local in self._stream:
                self._ready.put((self._put(local), self._stream.skipped))
                if self._closed:
                    return
            self._ready.put(StopIteration())
        except BaseException as error:
            self._ready.put(error)
