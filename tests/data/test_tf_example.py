"""Parser of tf.train.Example, compared with protobuf."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2

from ymplug_jax.data import tf_example

LISTS = st.one_of(
    st.lists(st.binary(max_size=200), max_size=5),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    st.lists(st.floats(width=32, allow_nan=False), max_size=5),
)


def message_of(content: dict[str, list]) -> tf_example_pb2.Example:
    message = tf_example_pb2.Example()
    for key, values in content.items():
        feature = message.features.feature[key]
        if values and isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif values and isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        else:
            feature.float_list.value.extend(values)
    return message


@given(st.dictionaries(st.text(max_size=20), LISTS, max_size=6), st.binary(max_size=9), st.binary(max_size=9))
def test_examples_written_by_protobuf(content: dict[str, list], before: bytes, after: bytes):
    payload = message_of(content).SerializeToString()
    data = before + payload + after
    found = tf_example.parse_example(data, len(before), len(before) + len(payload))
    assert found.keys() == content.keys()
    for key, values in content.items():
        pieces = tf_example.Slices(data, found[key].slices)
        assert pieces == [value for value in values if isinstance(value, bytes)]
        assert found[key].integers == [value for value in values if isinstance(value, int)]


def test_numbers_that_are_not_packed():
    """Older writers store every number in its own field."""
    feature = b"\x1a\x05\x08\x05\x08\x96\x01"
    data = wrapped(feature)
    assert tf_example.parse_example(data, 0, len(data))["k"].integers == [5, 150]
    assert list(tf_example_pb2.Example.FromString(data).features.feature["k"].int64_list.value) == [5, 150]


def wrapped(feature: bytes) -> bytes:
    """Encode an Example with one feature `k`, with all parts shorter than 128 bytes."""
    entry = b"\x0a\x01k\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    return b"\x0a" + bytes([len(features)]) + features


@given(st.dictionaries(st.text(max_size=5), LISTS, max_size=3), st.data())
def test_damaged_bytes(content: dict[str, list], draw: st.DataObject):
    """Damaged bytes give a ValueError or features, never another error or an endless loop. Valid bytes are parsed as by protobuf."""
    payload = bytearray(message_of(content).SerializeToString())
    for _ in range(draw.draw(st.integers(0, 3))):
        if payload:
            payload[draw.draw(st.integers(0, len(payload) - 1))] = draw.draw(st.integers(0, 255))
    data = bytes(payload[: draw.draw(st.integers(0, len(payload)))])
    try:
        expected = tf_example_pb2.Example.FromString(data)
    except DecodeError:
        expected = None
    try:
        found = tf_example.parse_example(data, 0, len(data))
    except ValueError:
        return
    assert all(piece.start <= piece.stop <= len(data) for feature in found.values() for piece in feature.slices)
    if expected is not None:
        assert found.keys() == expected.features.feature.keys()


def test_pieces():
    pieces = tf_example.Slices(b"abcdef", [slice(0, 2), slice(2, 2), slice(3, 6)])
    assert list(pieces) == [b"ab", b"", b"def"] and pieces[-1] == b"def" and len(pieces) == 3
    assert pieces[1:] == [b"", b"def"] and pieces != [b"ab"] and repr(pieces) == "[b'ab', b'', b'def']"
    assert np.frombuffer(pieces[2], np.uint8).tolist() == [100, 101, 102]
    with pytest.raises(IndexError):
        pieces[3]
