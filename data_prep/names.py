"""A set of file names in 16 bytes a name: a million names take 16 MB, and all workers can map one file of them."""

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

CHUNK = 65_536  # names hashed before they are put into an array


def keys_of(names: Iterable[str]) -> np.ndarray:
    """Return the keys of file names, uint64[n, 2].

    A key is 128 bits of BLAKE2 over the name in Unicode normal form C, since archives made on macOS hold decomposed names. Two names
    of ten million have equal keys with a probability of 1e-25.
    """
    digests = bytearray()
    for name in names:
        if not name.isascii():
            name = unicodedata.normalize("NFC", name)
        digests += hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return np.frombuffer(bytes(digests), np.uint64).reshape(-1, 2)


class Names:
    """A set of file names. `place` of a name is its position in the order in which the names were given."""

    def __init__(self, keys: np.ndarray):
        """Take the keys of the names, uint64[n, 2]. Of equal names the last one counts, as in an archive with updated members."""
        order = np.lexsort((np.arange(len(keys)), keys[:, 0]))
        self._keys, self._places = keys[order], order

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Read the names once, without keeping them."""
        parts, chunk = [np.empty((0, 2), np.uint64)], []
        for name in names:
            chunk.append(name)
            if len(chunk) == CHUNK:
                parts.append(keys_of(chunk))
                chunk.clear()
        return cls(np.concatenate([*parts, keys_of(chunk)]))

    def __len__(self) -> int:
        return len(self._keys)

    def places(self, names: Sequence[str]) -> np.ndarray:
        """Return the place of each name, int64[n]; -1: it is not among them."""
        wanted = keys_of(names)
        if not len(self._keys):
            return np.full(len(wanted), -1)
        last = np.searchsorted(self._keys[:, 0], wanted[:, 0], side="right") - 1
        found = (last >= 0) & (self._keys[last] == wanted).all(axis=1)
        return np.where(found, self._places[last], -1)
