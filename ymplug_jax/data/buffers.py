"""Arrays whose memory is used again. Fresh memory costs a page fault and zeroing for every 4 KB, a fifth of the loader's time."""

import sys
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike


def _references(arrays: list[np.ndarray], i: int) -> int:
    return sys.getrefcount(arrays[i])


_OWN = _references(
    [np.empty(0)], 0
)  # references to an array that only the list holds; it depends on the version of Python


class Arrays:
    """Uninitialised arrays. One that nobody refers to any more, directly or through a view, is given out again.

    CPython counts the references, and a view counts as one to the array that owns the memory. What uses an array without Python,
    such as a transfer to a device, holds a reference until it ends.
    """

    def __init__(self, keep: int):
        """Remember at most `keep` arrays; the oldest is forgotten first."""
        self._arrays: list[np.ndarray] = []
        self._keep, self._lock = keep, threading.Lock()

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """As `np.empty`."""
        shape, dtype = tuple(shape), np.dtype(dtype)
        with self._lock:
            for i in range(len(self._arrays)):
                if _references(self._arrays, i) == _OWN:
                    array = self._arrays[i]
                    if array.shape == shape and array.dtype == dtype:
                        return array
            array = np.empty(shape, dtype)
            self._arrays = [*self._arrays, array][-self._keep :]
            return array


class Results(threading.local):
    """Where a thread's next result goes: memory that the loader offers, such as a row of its batch, else an array used again."""

    _spare = Arrays(keep=64)  # shared by all threads

    def __init__(self) -> None:
        self._offered: np.ndarray | None = None

    def offer(self, array: np.ndarray | None) -> None:
        """Offer memory for the next result of its shape and dtype, instead of the memory offered before; None: offer none."""
        self._offered = array

    def empty(self, shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """As `np.empty`. The memory on offer is taken at most once."""
        offered = self._offered
        if offered is not None and offered.shape == tuple(shape) and offered.dtype == np.dtype(dtype):
            self._offered = None
            return offered
        return self._spare.empty(shape, dtype)


RESULTS = Results()


class Scratch(threading.local):
    """Memory of one thread for intermediate results, by name. It grows to the largest array asked for."""

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}

    def empty(self, name: str, shape: Sequence[int], dtype: DTypeLike) -> np.ndarray:
        """As `np.empty`; the array is valid until the thread asks for the same name again."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = self._memory.get(name)
        if memory is None or memory.size < size:
            memory = self._memory[name] = np.empty(size, np.uint8)
        return memory[:size].view(dtype).reshape(shape)
