"""The first stage: what is measured of a container, and the thresholds."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

import curation_clips as clips
from data_prep.curation import content, metadata
from data_prep.curation.metadata import measure, reason_of, scores_of
from data_prep.curation.settings import Metadata, from_config_dict
from ymplug_jax.core import config_file
from ymplug_jax.data.video_container import Reject

ROOT = Path(__file__).parents[3]
GOOD = {"container": "mov,mp4", "seconds": 20.0, "frames": 500.0, "width": 640.0, "height": 360.0, "aspect": 640 / 360}


def test_a_clip_is_measured_by_its_packets(tmp_path):
    scores = scores_of(measure(str(clips.write(clips.moving(0), tmp_path / "a.mp4"))))
    assert scores["seconds"] == pytest.approx(2.0, abs=0.01)
    assert (scores["frames"], scores["width"], scores["height"]) == (24, 192, 144)
    assert scores["aspect"] == pytest.approx(4 / 3, abs=1e-3)
    assert scores["problem"] is None and set(scores) == set(metadata.NAMES)
    assert reason_of(scores, Metadata(min_seconds=2.1)) == "duration"
    assert reason_of(scores, Metadata(min_seconds=1.9)) == ""


def test_the_default_config_drops_drawn_clips_for_their_duration_and_the_tiny_one_keeps_them(tmp_path):
    scores = scores_of(measure(str(clips.write(clips.moving(0, 16), tmp_path / "a.mp4"))))
    default, tiny = (
        from_config_dict(config_file.load(str(ROOT / name))) for name in ("configs/curate.py", "configs/tiny/curate.py")
    )
    assert reason_of(scores, default.metadata) == "duration"
    assert reason_of(scores, tiny.metadata) == ""


def test_the_frame_rate_of_the_header_does_not_count(tmp_path):
    """Times of packets tell the duration, although the header claims 1000 frames per second."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=1000, options={"threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 192, 144, "yuv420p"
        for k, frame in enumerate(clips.moving(1, 12)):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = 100 * k, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    assert measure(str(path))["seconds"] == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"seconds": 9.99}, "duration"),
        ({"seconds": 10.0}, ""),
        ({"seconds": 120.0}, ""),
        ({"seconds": 120.1}, "duration"),
        ({"width": 100.0}, "resolution"),
        ({"aspect": 2.6}, "aspect"),
        ({"container": "gif"}, "container"),
        ({"container": "matroska,webm"}, ""),
    ],
)
def test_thresholds(change, reason):
    assert reason_of(scores_of(GOOD | change), Metadata()) == reason
    assert reason in {"", *metadata.REASONS}


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", "empty_file"), (b"<html>404</html>" * 20, "not_a_video"), (b"\0\0\0\x18ftypmp42" + b"\1" * 500, "unreadable")]
)  # fmt: skip
def test_unusable_files_have_a_reason(tmp_path, data, reason):
    path = tmp_path / "a.mp4"
    path.write_bytes(data)
    with pytest.raises(Reject) as caught:
        measure(str(path))
    scores = scores_of(caught.value)
    assert scores["problem"] == reason_of(scores, Metadata()) == reason
    assert scores["seconds"] is None and scores["problem_detail"]


def test_reasons_of_stages_are_disjoint():
    assert not metadata.REASONS.keys() & content.REASONS.keys()
    assert all(meaning[0].islower() for meaning in (metadata.REASONS | content.REASONS).values())


def test_a_missing_score_is_no_number():
    with pytest.raises(ValueError, match="score seconds: None is not a number; measure the clip again"):
        metadata.number(scores_of(Reject("unreadable", "why")), "seconds")


def test_a_tall_clip_has_the_aspect_of_a_broad_one(tmp_path):
    tall = np.ascontiguousarray(clips.moving(0, 4).transpose(0, 2, 1, 3))
    assert measure(str(clips.write(tall, tmp_path / "a.mp4")))["aspect"] == pytest.approx(4 / 3, abs=1e-3)
