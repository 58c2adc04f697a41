"""Parser of tf.train.Example without protobuf. Values are neither copied nor decoded before they are accessed.

Messages in the wire format of Protocol Buffers: Example {1: Features}; Features {1: map<string, Feature>}; Feature is one of
{1: BytesList}, {2: FloatList}, {3: Int64List}; each list holds its values in field 1.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, overload

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types; 3 and 4 are groups, which no writer of Examples uses


class Feature(NamedTuple):
    """Values of one key of an Example. One of the two lists is empty; floats are ignored."""

    slices: list[slice]  # position of each bytes value in the data
    integers: list[int]


class Slices(Sequence[bytes]):
    """Slices of one buffer, each copied on access."""

    def __init__(self, data: bytes, slices: list[slice]):
        self._data, self._slices = data, slices

    def __len__(self) -> int:
        return len(self._slices)

    @overload
    def __getitem__(self, i: int) -> bytes: ...

    @overload
    def __getitem__(self, i: slice) -> "Slices": ...

    def __getitem__(self, i: int | slice) -> "bytes | Slices":
        if isinstance(i, slice):
            return Slices(self._data, self._slices[i])
        return self._data[self._slices[i]]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # equality is by content, so instances are not hashable; typeshed cannot express it

    def __repr__(self) -> str:
        return repr(list(self))


def parse_example(data: bytes, start: int, end: int) -> dict[str, Feature]:
    """Parse the Example in data[start:end] to {key: Feature}. The last entry of a repeated key counts, as in protobuf.

    Raises:
      ValueError: the bytes are not an Example.
    """
    found: dict[str, Feature] = {}
    for features in _messages(data, (start, end), 1):
        for entry in _messages(data, features, 1):
            key, feature = "", Feature([], [])
            for number, kind, value in _fields(data, *entry):
                if number == 1:
                    first, last = _message(kind, value)
                    key = data[first:last].decode()  # UnicodeDecodeError is a ValueError
                elif number == 2:
                    feature = _feature(data, _message(kind, value))
            found[key] = feature
    return found


def _feature(data: bytes, place: tuple[int, int]) -> Feature:
    slices = [value for values in _messages(data, place, 1) for value in _values(data, *values)]
    integers: list[int] = []
    for values in _messages(data, place, 3):
        for number, kind, value in _fields(data, *values):
            if number == 1:
                integers += [_signed(value)] if isinstance(value, int) else _packed(data, *_message(kind, value))
    return Feature(slices, integers)


def _values(data: bytes, at: int, end: int) -> list[slice]:
    """Return the position of each value of a BytesList; `_messages` with less overhead, since a record has many values."""
    found: list[slice] = []
    while at < end:
        if data[at] != 1 << 3 | BYTES:
            return found + [slice(*value) for value in _messages(data, (at, end), 1)]
        size, at = _varint(data, at + 1, end)
        if at + size > end:
            raise ValueError(f"invalid field 1 of {size} bytes at byte {at}")
        found.append(slice(at, at + size))
        at += size
    return found


def _messages(data: bytes, place: tuple[int, int], wanted: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of every field with number `wanted`, which holds a message or bytes."""
    for number, kind, value in _fields(data, *place):
        if number == wanted:
            yield _message(kind, value)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int | tuple[int, int]]]:
    """Yield (number, wire type, value) of each field. The value of other fields than varints is (start, end)."""
    while at < end:
        tag, at = (data[at], at + 1) if data[at] < 128 else _varint(data, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == BYTES:
            size, at = _varint(data, at, end)
        elif kind == VARINT:
            value, at = _varint(data, at, end)
            yield number, kind, value
            continue
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {kind} at byte {at}")
        if not number or at + size > end:
            raise ValueError(f"invalid field {number} of {size} bytes at byte {at}")
        yield number, kind, (at, at + size)
        at += size


def _message(kind: int, value: int | tuple[int, int]) -> tuple[int, int]:
    if kind != BYTES or isinstance(value, int):
        raise ValueError(f"wire type {kind} instead of a message or bytes")
    return value


def _packed(data: bytes, at: int, end: int) -> list[int]:
    values = []
    while at < end:
        value, at = _varint(data, at, end)
        values.append(_signed(value))
    return values


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Decode a varint: (value below 2**64, offset after it)."""
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        if byte < 128:
            return value | byte << shift if shift < 63 else (value | byte << shift) & (2**64 - 1), at
        value |= (byte & 127) << shift
        shift += 7
    raise ValueError(f"unterminated number at byte {at}")
