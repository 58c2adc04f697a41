"""The content stage: black, frozen, blurred, bordered clips, slide shows and cuts, in one protected decoding pass."""

import dataclasses
import os
import signal
import time

import cv2
import numpy as np
import pytest

import curation_clips as clips
from data_prep import plant_copies
from data_prep.curation import content
from data_prep.curation.content import look, measure, reason_of, scores_of
from data_prep.curation.settings import Content, Duplicates, Scores
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_file import Reader

SETTINGS = Content()


def looked(frames: np.ndarray, tmp_path, quality: str = plant_copies.CLEAN) -> Scores:
    return scores_of(look(str(clips.write(frames, tmp_path / "a.mp4", quality)), SETTINGS, Duplicates()))


def still(seed: int, count: int = 24) -> np.ndarray:
    return np.repeat(clips.picture(seed)[None], count, axis=0)


def noisy(frames: np.ndarray, strength: float) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, strength, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


def slow(count: int = 60) -> np.ndarray:
    """A disc that moves by a quarter of a pixel a frame."""
    frames = np.repeat(clips.picture(3)[None], count, axis=0)
    for k, frame in enumerate(frames):
        cv2.circle(frame, (round(16 * (60 + k / 4)), 16 * 70), 16 * 20, (250, 30, 30), -1, shift=4)
    return frames


def letterboxed(frames: np.ndarray, bar: int) -> np.ndarray:
    return np.pad(frames, [(0, 0), (bar, bar), (0, 0), (0, 0)])


CASES = {
    "moving": (lambda: clips.moving(1), ""),
    "slow": (slow, ""),
    "black": (lambda: np.zeros((24, 144, 192, 3), np.uint8), "black"),
    "dark noise": (lambda: np.random.default_rng(0).integers(0, 14, (24, 144, 192, 3), np.uint8), "black"),
    "black intro": (lambda: np.concatenate([np.zeros((6, 144, 192, 3), np.uint8), clips.moving(1)]), ""),
    "black after a second": (lambda: np.concatenate([clips.moving(1, 12), np.zeros((24, 144, 192, 3), np.uint8)]), "black"),
    "frozen": (lambda: still(1), "frozen"),
    "frozen with grain": (lambda: noisy(still(1), 3.0), "frozen"),
    "half frozen": (lambda: np.concatenate([clips.moving(1, 12), np.repeat(clips.moving(1, 12)[-1:], 12, axis=0)]), ""),
    "slides": (lambda: np.concatenate([still(s, 8) for s in range(6)]), "slide_show"),
    "blurred": (lambda: np.stack([cv2.GaussianBlur(f, (0, 0), 6) for f in clips.moving(1)]), "blurred"),
    "thin bars": (lambda: letterboxed(clips.moving(1), 20), ""),
    "broad bars": (lambda: letterboxed(clips.moving(1), 90), "bordered"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_clip_shows(name, tmp_path):
    make, reason = CASES[name]
    scores = looked(make(), tmp_path)
    assert reason_of(scores, SETTINGS) == reason, scores
    assert set(scores) == set(content.NAMES)


@pytest.mark.parametrize("name", ["moving", "slow", "frozen", "half frozen"])
def test_a_strong_encoding_changes_no_verdict(name, tmp_path):
    make, reason = CASES[name]
    assert reason_of(looked(make(), tmp_path, plant_copies.STRONG), SETTINGS) == reason


def test_bars_are_measured_with_a_logo_in_one(tmp_path):
    frames = letterboxed(clips.moving(2), 24)
    frames[:, 5:15, 150:180] = 255
    scores = looked(frames, tmp_path)  # at 160 of 192 pixels
    assert [scores[f"border_{side}"] for side in ("top", "bottom", "left", "right")] == pytest.approx(
        [20, 20, 0, 0], abs=1
    )
    assert scores["border"] == pytest.approx(0.25, abs=0.02)


def test_cuts_are_counted_and_camera_motion_is_none(tmp_path):
    shots = np.concatenate([still(seed, 12) for seed in range(8)])  # 7 cuts in 8 s, looked at 4 times a second
    scores = looked(shots, tmp_path)
    assert scores["cuts_per_minute"] == pytest.approx(60 * 7 / content.SHORTEST, abs=7)  # the ends hide one at most
    assert reason_of(scores | {"slides": 0.0, "cuts_per_minute": 61.0}, SETTINGS) == "many_cuts"
    assert looked(clips.moving(0, 30), tmp_path)["cuts_per_minute"] == 0


@pytest.mark.parametrize("name", ["black", "frozen", "blur", "border", "slides", "cuts_per_minute", "decoded"])
def test_each_threshold_decides(name, tmp_path):
    """A clip at its own score is kept, and dropped when the threshold passes the score."""
    threshold = {"cuts_per_minute": "max_cuts_per_minute", "decoded": "min_decoded"}.get(name, f"max_{name}")
    scores = looked(CASES["moving"][0](), tmp_path) | {name: 0.5}
    least = threshold.startswith("min")
    all_pass = dataclasses.replace(SETTINGS, min_decoded=0.0, max_frozen=1.0)
    assert reason_of(scores, dataclasses.replace(all_pass, **{threshold: 0.5})) == ""
    dropped = reason_of(scores, dataclasses.replace(all_pass, **{threshold: 0.51 if least else 0.49}))
    assert dropped in content.REASONS


def test_a_clip_of_one_frame_is_frozen():
    assert measure(clips.picture(0)[None, :, :, 0], [], 0.1, SETTINGS)["frozen"] == 1.0


def test_a_clip_that_breaks_off_is_undecodable(tmp_path):
    path = clips.write(clips.moving(1, 48), tmp_path / "a.mp4")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    size = int.from_bytes(data[start - 8 : start - 4], "big")
    for at in range(start + size // 3, start + size - 8):
        data[at] = 0
    path.write_bytes(bytes(data))
    reader = Reader(60.0)
    try:
        try:
            scores = scores_of(reader.ask(look, path, SETTINGS, Duplicates()))
        except Reject as reject:
            scores = scores_of(reject)
    finally:
        reader.close()
    assert reason_of(scores, SETTINGS) == "undecodable", scores


def _crash(path: str) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _hang(path: str) -> None:
    time.sleep(60)


def _name(path: str, more: int) -> tuple[str, int]:
    return os.path.basename(path), more


def test_a_crash_and_a_hang_are_reasons_and_the_reader_goes_on(tmp_path):
    reader = Reader(3.0)
    try:
        with pytest.raises(Reject, match="the decoder crashed on the file"):
            reader.ask(_crash, tmp_path / "a")
        with pytest.raises(Reject) as caught:
            reader.ask(_hang, tmp_path / "a")
        assert caught.value.reason == "timed_out"
        assert reason_of(scores_of(caught.value), SETTINGS) == "undecodable"
        assert reader.ask(_name, tmp_path / "b", 3) == ("b", 3)
    finally:
        reader.close()


def test_what_is_found_is_the_same_in_another_process(tmp_path):
    path = clips.write(clips.moving(5), tmp_path / "a.mp4")
    here = look(str(path), SETTINGS, Duplicates())
    reader = Reader(60.0)
    try:
        there = reader.ask(look, path, SETTINGS, Duplicates())
    finally:
        reader.close()
    assert there.scores == here.scores
    assert all(np.array_equal(a, b) for a, b in zip(there.print, here.print, strict=True))
