"""Resize and augmentation on the devices: as the host does them, within a level, and part of the compiled step."""

import dataclasses

import cv2
import jax
import numpy as np
import pytest

import tiny
from ymplug_jax.core import sharding
from ymplug_jax.core.config import Data
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import transforms, windows
from ymplug_jax.data.records import Record
from ymplug_jax.tasks.common import preprocess
from ymplug_jax.training import device_augment, setup
from ymplug_jax.training import step as step_lib

SIZE = 48


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """A smooth picture with noise."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return cv2.add(image, rng.integers(0, 24, image.shape, dtype=np.uint8))


@pytest.mark.parametrize("wrap", [False, True])
def test_as_the_host_within_a_level(wrap: bool):
    finish = jax.jit(lambda clip: device_augment.finish(clip, SIZE, wrap=wrap))
    differ = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        height, width = (int(side) for side in rng.integers(40, 90, 2))
        clip = [picture(height, width, seed), picture(height, width, seed + 1)]
        host = transforms.train_transform(clip, SIZE, np.random.default_rng(seed), wrap_uint8=wrap)
        window = windows.train_window(clip, 90, np.random.default_rng(seed))
        assert window.shape == windows.shape(2, 90) and window.dtype == np.uint8
        apart = (np.asarray(finish(window)).astype(int) - host) % 256  # 0 and 255 are neighbours where values wrap
        differ.append((np.minimum(apart, 256 - apart) > 0).mean())
        assert np.isin(apart, (0, 1, 255)).all(), f"seed {seed}"
    assert np.mean(differ) < 0.003 and len({round(share, 6) for share in differ}) > 1


@pytest.mark.parametrize("flip", [False, True])
def test_flip_and_operations_are_exact(flip: bool):
    """A crop of the result's own size is not interpolated, so that nothing is rounded differently."""
    video = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), dtype=np.uint8)
    finish = jax.jit(lambda clip: device_augment.finish(clip, SIZE))
    names = list(transforms.OPERATIONS)
    for first, second in zip(names, names[1:] + names[:1], strict=True):
        window = windows.finished_window(video, SIZE + 7)
        draws = np.array([SIZE, SIZE, flip, names.index(first), names.index(second)], "<u2").view(np.uint8)
        window[:, -1].reshape(2, -1)[:, : len(draws)] = draws
        start = video[:, :, ::-1] if flip else video
        expected = [
            transforms.operate(transforms.operate(np.ascontiguousarray(frame), first), second) for frame in start
        ]
        np.testing.assert_array_equal(finish(window), expected, err_msg=f"{first}, {second}")


def test_finished_clips_stay_as_they_are():
    video = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    np.testing.assert_array_equal(device_augment.finish(windows.finished_window(video, SIZE), SIZE), video)


def test_the_host_sends_windows_in_training_only():
    jpeg = cv2.imencode(".jpg", picture(60, 80, 0))[1].tobytes()
    record = Record("clip", [jpeg] * 4, np.zeros(4, np.int64), "", [], "", -1)
    data = Data(frames=2, image_size=SIZE, window=80)
    sent = preprocess.video_of(record, data, np.random.default_rng(0))
    assert sent.shape == windows.shape(2, 80)
    again = preprocess.video_of(record, data, np.random.default_rng(0))
    np.testing.assert_array_equal(sent, again, err_msg="all bytes are a function of the generator, the padding too")
    assert preprocess.video_of(record, data, None).shape == (2, SIZE, SIZE, 3)
    assert preprocess.still_of(record, data, np.random.default_rng(0)).shape == windows.shape(2, 80)
    with pytest.raises(Mistake, match=r"config.data.window: 48, but a crop has \d+ x \d+ pixels"):
        preprocess.video_of(record, dataclasses.replace(data, window=48), np.random.default_rng(0))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_step_reads_windows(devices: int):
    """The loss of a batch of windows is that of the videos which the devices make of them."""
    plain = tiny.prepare(devices)
    data = dataclasses.replace(plain.experiment.data, augment=True, window=24)
    run = dataclasses.replace(plain, experiment=dataclasses.replace(plain.experiment, data=data))
    spec = setup.training_batch(run)["video"]
    size, frames = data.image_size, data.frames
    assert spec.shape[1:] == windows.shape(frames, 24)
    batch = tiny.batch(plain)
    clips = [
        windows.train_window([picture(20, 22, n)] * frames, 24, np.random.default_rng(n)) for n in range(spec.shape[0])
    ]
    videos = np.stack([device_augment.finish(clip, size) for clip in clips])
    losses = []
    for one, video in ((plain, videos), (run, np.stack(clips))):
        now, frozen, _ = setup.fresh_state(one)
        key = jax.device_put(jax.random.key(0), sharding.replicated(one.mesh))
        video = jax.device_put(video, sharding.batch_sharding(one.mesh))
        _, metrics = step_lib.compile_step(one)(now, frozen, batch | {"video": video}, key)
        losses.append(metrics["loss"].value())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": False}, "needs config.data.augment"),
        ({"window": 8}, "8 is smaller than config.data.image_size; set it to 16 or more"),
        ({"frames": 3}, "this task prepares its media on the host"),
    ],
)
def test_settings_that_leave_nothing_to_do(changes: dict, message: str):
    run = tiny.prepare()
    data = dataclasses.replace(run.experiment.data, **{"augment": True, "window": 24, **changes})
    with pytest.raises(Mistake, match=message):
        device_augment.window_spec(data, run.task.spec)
