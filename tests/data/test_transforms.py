"""Transforms: equal for all frames of a clip, determined by the generator, within their limits."""

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ymplug_jax.core.config import Data
from ymplug_jax.data import transforms
from ymplug_jax.data.records import Record
from ymplug_jax.tasks.common import preprocess

SIDES = st.integers(8, 60)


def noise(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@settings(max_examples=40, deadline=None)
@given(height=SIDES, width=SIDES, size=st.integers(4, 40), seed=st.integers(0, 2**32))
def test_train_transform(height: int, width: int, size: int, seed: int):
    """A clip of identical frames stays one, since crop, flip and operations are drawn per clip."""
    clip = noise(1, height, width).repeat(3, axis=0)
    kept = clip.copy()
    out = transforms.train_transform(clip, size, np.random.default_rng(seed))
    assert out.shape == (3, size, size, 3) and out.dtype == np.uint8
    assert (out == out[0]).all() and (clip == kept).all()
    again = transforms.train_transform(clip, size, np.random.default_rng(seed))
    np.testing.assert_array_equal(out, again)


def test_other_seeds_give_other_clips():
    clip = noise(2, 40, 50)
    outs = {transforms.train_transform(clip, 24, np.random.default_rng(seed)).tobytes() for seed in range(20)}
    assert len(outs) == 20


def test_bright_pixels_stay_bright():
    """A bicubic filter overshoots at sharp edges; values are clipped by default and wrapped with wrap_uint8."""
    values = np.array([[-3.0, 0, 255, 261]], np.float32)
    assert transforms.to_uint8(values).tolist() == [[0, 0, 255, 255]]
    assert transforms.to_uint8(values, wrap=True).tolist() == [[253, 0, 255, 5]]
    clip = np.full((1, 40, 40, 3), 255, np.uint8)
    clip[:, :, 20:] = 0
    record = Record("edge", [cv2.imencode(".png", clip[0])[1].tobytes()], np.zeros(1, np.int64), "", [], "", -1)
    clipped, wrapped = (
        preprocess.video_of(record, Data(frames=1, image_size=64, wrap_uint8=wrap), np.random.default_rng(5)).astype(
            int
        )
        for wrap in (False, True)
    )
    assert np.abs(clipped - wrapped).max() > 200


@given(height=st.integers(1, 400), width=st.integers(1, 400), seed=st.integers(0, 999))
def test_crop(height: int, width: int, seed: int):
    top, left, h, w = transforms.choose_crop(height, width, np.random.default_rng(seed))
    assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
    if min(height, width) > 60 and 3 / 4 < width / height < 4 / 3:
        assert 0.48 < h * w / (height * width) <= 1 and 0.73 < w / h < 1.36


def test_crop_of_a_strip_is_central():
    assert transforms.choose_crop(30, 300, np.random.default_rng(0)) == (0, 130, 30, 40)
    assert transforms.choose_crop(300, 30, np.random.default_rng(0)) == (130, 0, 40, 30)


def test_the_whole_frame_at_its_own_size_is_the_frame():
    clip = noise(2, 24, 24)
    out = [transforms.to_uint8(values) for values in transforms.crop_resize(clip, (0, 0, 24, 24), 24)]
    np.testing.assert_array_equal(out, clip)


def test_operations_are_two_and_differ():
    drawn = {tuple(transforms.choose_operations(np.random.default_rng(seed))) for seed in range(800)}
    assert all(len(pair) == 2 and pair[0] != pair[1] for pair in drawn)
    assert len(drawn) == 9 * 8, "every ordered pair"


@pytest.mark.parametrize("name", ["Identity", "Contrast", "Brightness", "Sharpness"])
def test_colours_at_level_5_are_left_alone(name: str):
    frame = noise(1, 20, 30)[0]
    np.testing.assert_array_equal(transforms.operate(frame, name), frame)


def test_colours_at_other_levels():
    frame = noise(1, 20, 30)[0].clip(60, 190)
    half = 0.1 / 1.8 * 10, 0.4 / 1.8 * 10  # levels with factors 0.2 and 0.5
    np.testing.assert_array_equal(transforms.operate(frame, "Brightness", half[1]), frame // 2)
    assert transforms.operate(frame, "Brightness", 10).mean() > frame.mean() * 1.3
    assert transforms.operate(frame, "Contrast", half[0]).std() < frame.std() * 0.25
    assert transforms.operate(frame, "Contrast", 10).std() > frame.std() * 1.5
    smooth, sharp = (
        np.diff(transforms.operate(frame, "Sharpness", level).astype(int), axis=1).std() for level in (0, 10)
    )
    assert smooth < np.diff(frame.astype(int), axis=1).std() < sharp


def spot(frame: np.ndarray) -> tuple[float, float]:
    """Return (x, y) of the centre of the bright pixels."""
    y, x = np.nonzero(frame[..., 0] > 160)
    return float(x.mean()), float(y.mean())


@pytest.mark.parametrize(
    ("name", "level", "moved"),
    [
        ("TranslateX", 5, (-5, 0)), ("TranslateX", -5, (5, 0)), ("TranslateY", 5, (0, -5)), ("TranslateY", -5, (0, 5)),
        ("ShearX", 5, (1.5, 0)), ("ShearX", -5, (-1.5, 0)), ("ShearY", 5, (0, 4.5)), ("Rotate", 5, (-5.5, -1.85)),
    ],
)  # fmt: skip
def test_warp_directions(name: str, level: float, moved: tuple[float, float]):
    """Move a spot at (30, 10) of a 40 x 60 frame, with centre of rotation (20, 30)."""
    frame = np.zeros((60, 40, 3), np.uint8)
    frame[9:12, 29:32] = 255
    x, y = spot(transforms.operate(frame, name, level))
    assert abs(x - 30 - moved[0]) < 0.6 and abs(y - 10 - moved[1]) < 0.6


@pytest.mark.parametrize("name", sorted(transforms.MATRICES))
@pytest.mark.parametrize(("height", "width", "level"), [(64, 64, 5.0), (64, 64, -7.0), (37, 50, 3.3)])
def test_warps_are_those_of_opencv(name: str, height: int, width: int, level: float):
    """Equal to `warpAffine` in every bit, as the reference was."""
    frame = noise(1, height, width)[0]
    matrix = transforms.MATRICES[name](height, width, level)
    expected = cv2.warpAffine(frame, matrix, (width, height), borderValue=transforms.FILL, flags=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(transforms.operate(frame, name, level), expected)


@pytest.mark.parametrize("wrap", [False, True])
def test_train_transform_is_its_parts(wrap: bool):
    """The short cuts (a flip within a warp, no identities, shared memory) change no bit."""
    drawn = set()
    for seed in range(60):
        clip, rng = noise(2, 50, 61, seed), np.random.default_rng(seed)
        crop = transforms.choose_crop(50, 61, rng)
        flip, names = rng.random() < 0.5, transforms.choose_operations(rng)
        drawn |= {(bool(flip), name) for name in names}
        expected = []
        for values in transforms.crop_resize(clip, crop, 32):
            frame = transforms.to_uint8(values, wrap=wrap)
            frame = np.ascontiguousarray(frame[:, ::-1]) if flip else frame
            for name in names:
                frame = transforms.operate(frame, name)
            expected.append(frame)
        out = transforms.train_transform(clip, 32, np.random.default_rng(seed), wrap_uint8=wrap)
        np.testing.assert_array_equal(out, expected, err_msg=f"seed {seed}: {flip}, {names}")
    assert len(drawn) == 18, "each operation, with and without a flip"


def test_warps_fill_with_grey():
    frame = np.zeros((20, 20, 3), np.uint8)
    out = transforms.operate(frame, "TranslateX")
    assert (out[:, -5:] == 128).all() and (out[:, :-5] == 0).all()


def test_warps_reach_one_side():
    """Grey appears on one side only, as in the reference. Truncation may turn 255 into 254."""
    clip = np.full((1, 60, 60, 3), 255, np.uint8)

    seen = set()
    for seed in range(300):
        out = transforms.train_transform(clip, 40, np.random.default_rng(seed))[0, :, :, 0]
        if (out[:, :5] == 128).all() and (out[:, 5:] >= 254).all():
            seen.add("left")
        if (out[:, -5:] == 128).all() and (out[:, :-5] >= 254).all():
            seen.add("right")
    assert seen == {"right"}


@given(height=SIDES, width=SIDES, size=st.integers(1, 80))
def test_eval_transform(height: int, width: int, size: int):
    """Every output pixel is the source pixel given by the nearest-neighbour rule."""
    clip = noise(2, height, width)
    out = transforms.eval_transform(clip, size)
    rows, columns = transforms.nearest(height, size), transforms.nearest(width, size)
    np.testing.assert_array_equal(out, clip[:, rows][:, :, columns])
    for source, index in ((height, rows), (width, columns)):
        exact = np.arange(size) * source / size
        assert (index >= 0).all() and (index < source).all() and (np.abs(index - np.floor(exact)) <= 1).all()


@pytest.mark.parametrize(
    ("source", "size", "place", "index"), [(234, 224, 112, 116), (340, 224, 56, 85), (256, 224, 7, 8)]
)
def test_nearest_rounds_as_pytorch_does(source: int, size: int, place: int, index: int):
    """Where i * source / size is whole, float32 rounding decides. Values are from torch.nn.functional.interpolate."""
    assert transforms.nearest(source, size)[place] == index


def test_bilinear_option():
    clip = noise(2, 30, 41)
    out = transforms.eval_transform(clip, 24, bilinear=True)
    np.testing.assert_array_equal(out[1], cv2.resize(clip[1], (24, 24), interpolation=cv2.INTER_LINEAR))
    assert (out != transforms.eval_transform(clip, 24)).any()
