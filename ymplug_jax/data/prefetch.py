"""The last hop before the step: batches move to the devices while it runs."""

import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from ymplug_jax.data.loader import Batches, Example

Batch = TypeVar("Batch")


class Feed(Generic[Batch]):
    """Batches that are put on the devices two ahead of the one taken. A thread of its own puts them there, so that neither
    a late batch nor its transfer keeps the loop from a batch that is ready."""

    def __init__(self, stream: Batches, put: Callable[[Example], Batch]):
        """Begin to read.

        Args:
          stream: of this host's rows; closed with the feed.
          put: starts the transfer of one batch; runs in the feed's thread.
        """
        self.skipped = 0  # corrupt records in the batches given out so far
        self._stream, self._put = stream, put
        self._ready: queue.Queue = queue.Queue(1)  # the thread holds the second
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        """The next batch; errors of reading and of `put` come out here.

        Raises:
          StopIteration: the stream is at its end.
        """
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # for whoever asks again
            raise item
        batch, self.skipped = item
        return batch

    def close(self) -> None:
        """End the thread, after the batch it is at, and the stream."""
        self._closed = True
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._ready.get_nowait()  # it may be waiting for room
            self._thread.join(0.01)
        self._stream.close()

    def _run(self) -> None:
        try:
            for local in self._stream:
                self._ready.put((self._put(local), self._stream.skipped))
                if self._closed:
                    return
            self._ready.put(StopIteration())
        except BaseException as error:
            self._ready.put(error)
