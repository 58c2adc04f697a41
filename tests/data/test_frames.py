"""Sampling of frames, and decoding of JPEG."""

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ymplug_jax.data import frames


@given(wanted=st.integers(1, 40), available=st.integers(1, 400), seed=st.one_of(st.none(), st.integers(0, 99)))
def test_chosen_frames(wanted: int, available: int, seed: int | None):
    rng = None if seed is None else np.random.default_rng(seed)
    chosen = frames.choose_frames(wanted, available, rng)
    count = min(wanted, available)
    assert chosen.dtype == np.int64 and chosen.shape == (wanted,)
    assert chosen[0] >= 0 and chosen[-1] < available
    assert (np.diff(chosen[:count]) > 0).all(), "in time order, none twice"
    assert (chosen[count:] == chosen[count - 1]).all(), "a short clip repeats its last frame"
    cuts = np.linspace(0, available, count + 1).astype(int)
    first, last = cuts[:-1], cuts[1:] - 1
    if seed is None or (last > first).all():
        assert (chosen[:count] >= first).all() and (chosen[:count] <= last).all(), "one in each interval"
    if seed is not None and (last > first).all():
        assert (chosen[:count] < last).all(), "never the last of an interval"


def test_choice_is_a_function_of_the_generator():
    draws = {tuple(frames.choose_frames(4, 100, np.random.default_rng(seed))) for seed in (1, 2, 3, 1)}
    assert len(draws) == 3
    assert tuple(frames.choose_frames(4, 100, None)) == (12, 37, 62, 87)


def test_no_frames():
    with pytest.raises(ValueError, match="the clip has no frames"):
        frames.choose_frames(4, 0, None)


def flat(colour: tuple[int, int, int], height: int = 16, width: int = 24) -> bytes:
    """Encode a JPEG of a single RGB colour."""
    return cv2.imencode(".jpg", np.full((height, width, 3), colour[::-1], np.uint8))[1].tobytes()


def test_decoding():
    """Frames are RGB and in the requested order; repeated indices repeat frames; other frames are not decoded."""
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250)]
    jpegs = [flat(colours[0]), b"not a picture", flat(colours[1]), flat(colours[2])]
    clip = frames.decode_frames(jpegs, np.array([0, 2, 3, 3]))
    assert clip.shape == (4, 16, 24, 3) and clip.dtype == np.uint8
    expected = np.array([*colours, colours[2]])[:, None, None]
    assert np.abs(clip.astype(int) - expected).max() <= 3
    with pytest.raises(ValueError, match="frame 1 of the record: not a JPEG"):
        frames.decode_frames(jpegs, [0, 1])
    one_by_one = frames.Decoded(jpegs, np.array([0, 2, 3, 3]))
    assert len(one_by_one) == 4 and one_by_one[3] is one_by_one[2], "decoded once"
    np.testing.assert_array_equal(list(one_by_one), clip)


def test_decoding_is_bit_identical_to_opencv():
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    expected = cv2.cvtColor(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    np.testing.assert_array_equal(frames.decode_frames([jpeg.tobytes()], [0])[0], expected)


def test_frames_of_two_sizes():
    with pytest.raises(ValueError, match=r"frame 1 of the record: size \(8, 8\), but the first frame has \(16, 24\)"):
        frames.decode_frames([flat((1, 2, 3)), flat((1, 2, 3), 8, 8)], [0, 1])
