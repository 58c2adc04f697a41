"""Video detection, frame sizes and times of a clip, and crashes of the decoder process."""

import io
import os
import signal
import threading
import time
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

import videos
from ymplug_jax.data import video_container, video_file
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_file import DecoderFailed, Reader, read_clip, timeline


def reason_of(path: Path) -> str:
    with pytest.raises(Reject) as caught:
        read_clip(str(path), 4)
    assert caught.value.reason in video_container.REASONS and "\n" not in caught.value.detail
    return caught.value.reason


def pictures(path: Path, codec: str, kind: str, count: int, pixels: str) -> Path:
    """Write a file of 64x64 pictures in the format `kind`."""
    with av.open(str(path), "w", format=kind) as file:
        stream = file.add_stream(codec, rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = pixels
        for i in range(count):
            picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 20 + 30 * i, np.uint8), "rgb24")
            file.mux(stream.encode(picture.reformat(format=pixels)))
        file.mux(stream.encode())
    return path


def song(path: Path, attached: bool) -> Path:
    """Write audio with cover art, marked as such or as a plain track with one picture."""
    with av.open(str(path), "w", format="mp4") as file:
        sound, cover = file.add_stream("aac", rate=44100), file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        if attached:
            cover.disposition = av.stream.Disposition.attached_pic.value
        picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 120, np.uint8), "rgb24")
        file.mux(cover.encode(picture.reformat(format="yuvj420p")))
        file.mux(cover.encode())
        quiet = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        quiet.sample_rate = 44100
        for i in range(20):
            quiet.pts = i * 1024
            file.mux(sound.encode(quiet))
        file.mux(sound.encode())
    return path


@pytest.mark.parametrize("attached", [True, False])
def test_a_cover_is_no_video(tmp_path: Path, attached: bool):
    assert reason_of(song(tmp_path / "song.mp4", attached)) == "no_video_stream"


def test_text_lists_and_pictures_are_no_videos(tmp_path: Path):
    """FFmpeg would render text as a video, and follow playlists to files outside the video root."""
    videos.write(tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "elsewhere.ts"), "w", format="mpegts") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(20):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * i, np.uint8), "rgb24")))
        file.mux(stream.encode())
    assert len(read_clip(str(tmp_path / "elsewhere.ts"), 4).frames) == 4
    texts = {
        "notes.txt": "hello this is a text file\n" * 50,
        "art.nfo": "\x1b[31m ####\n" * 50,
        "good.mp4": "Good morning, this begins as a transport stream does\n" * 20,
        "list.mp4": "ffconcat version 1.0\nfile clip.mp4\n",
        "list.txt": f"ffconcat version 1.0\nfile '{tmp_path}/clip.mp4'\n",
        "play.m3u8": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n"
        f"{tmp_path}/elsewhere.ts\n#EXT-X-ENDLIST\n",
        "play.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{tmp_path}/elsewhere.ts\n#EXT-X-ENDLIST\n",
        "call.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "dash.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period/></MPD>\n',
        "words.srt": "1\n00:00:01,000 --> 00:00:02,000\n你好\n\n2\n00:00:03,000 --> 00:00:04,000\n再见\n",
        "words.ass": "[Script Info]\nScriptType: v4.00+\n[Events]\nDialogue: 0,0:00:01.00,0:00:02.00,,,0,0,0,,hi\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert reason_of(tmp_path / name) == "not_a_video", name
    grey = np.full((64, 64, 3), 99, np.uint8)
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp", "a%03d.png"):
        (tmp_path / name).write_bytes(cv2.imencode(Path(name).suffix, grey)[1].tobytes())
        (tmp_path / "a001.png").write_bytes(cv2.imencode(".png", grey)[1].tobytes())
        assert reason_of(tmp_path / name) == "not_a_video", name
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.png").read_bytes())
    assert reason_of(tmp_path / "a.mp4") == "not_a_video", "the content counts, not the name"


def test_animated_pictures_are_videos_and_single_ones_are_not(tmp_path: Path):
    for codec, kind, pixels in (("gif", "gif", "rgb8"), ("apng", "apng", "rgb24")):
        clip = read_clip(str(pictures(tmp_path / f"moving.{kind}", codec, kind, 6, pixels)), 6)
        assert clip.decoded == 6 and clip.timestamps == [0, 200_000, 400_000, 600_000, 800_000, 1_000_000]
        assert reason_of(pictures(tmp_path / f"still.{kind}", codec, kind, 1, pixels)) == "not_a_video"


def test_names_that_look_like_protocols_are_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    videos.write(tmp_path / "a.mp4")
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mp4", "http:a.mp4", "-", "a%03d.mp4", "片段 #1?.mp4"):
        os.link("a.mp4", name)
        assert read_clip(name, 4).decoded == 4


def test_metadata_that_is_not_utf8_is_ignored(tmp_path: Path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w", options={"movflags": "use_metadata_tags"}) as file:
        file.metadata["comment"] = "LATIN-MARK"
        stream = file.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(8):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 90, np.uint8), "rgb24")))
        file.mux(stream.encode())
    data = path.read_bytes()
    assert b"LATIN-MARK" in data
    path.write_bytes(data.replace(b"LATIN-MARK", b"LATIN-\xfe\xff\xd6\xd0"))
    assert read_clip(str(path), 4).decoded == 4


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, ValueError, NameError])
def test_bugs_are_not_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]):
    videos.write(tmp_path / "a.mp4")

    def changed(*args: object, **more: object) -> None:
        raise error("open() got an unexpected keyword argument")

    monkeypatch.setattr(video_container.av, "open", changed)
    with pytest.raises(error, match="unexpected keyword"):
        read_clip(str(tmp_path / "a.mp4"), 4)


def test_bugs_in_the_decoder_process_are_raised(tmp_path: Path):
    reader = Reader(30.0)
    with pytest.raises(RuntimeError, match=r"(?s)a bug in reading .*Traceback.*TypeError"):
        reader.read(videos.write(tmp_path / "a.mp4"), "four")
    assert reader.read(tmp_path / "a.mp4", 4).decoded == 4
    reader.close()


def stream_of(path: Path, sizes: list[tuple[int, int]], frames: int = 20) -> Path:
    """Concatenate transport streams of several sizes that all start at the same time."""
    data = b""
    for width, height in sizes:
        part = io.BytesIO()
        with av.open(part, "w", format="mpegts") as file:
            stream = file.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for i in range(frames):
                picture = np.full((height, width, 3), 20 + 10 * i, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
            file.mux(stream.encode())
        data += part.getvalue()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("sizes", [[(320, 240), (240, 320)], [(64, 64), (640, 480)], [(640, 480), (64, 64)]])
def test_a_record_has_one_size(tmp_path: Path, sizes: list[tuple[int, int]]):
    clip = read_clip(str(stream_of(tmp_path / "switch.ts", sizes)), 16)
    shapes = {cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR).shape for jpeg in clip.frames}
    expected = {(320, 240): (240, 320), (64, 64): (64, 64), (640, 480): (256, 341)}[sizes[0]]
    assert shapes == {(*expected, 3)} and (clip.height, clip.width) == expected
    # 40 frames at 10 per second; the times of the second half restart at zero.
    expected_times = [(2 * i + 1) * 40 // 32 * 100_000 for i in range(16)]
    np.testing.assert_allclose(np.diff(clip.timestamps), np.diff(expected_times), atol=1000)


@pytest.mark.parametrize("num_frames", [4, 7, 16, 20])
def test_times_of_b_frames_in_avi_rise(tmp_path: Path, num_frames: int):
    """AVI stores no presentation times, so the times of H.264 with B frames are in coding order."""
    with av.open(str(tmp_path / "b.avi"), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(40):
            picture = np.full((48, 64, 3), 20 + 5 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        file.mux(stream.encode())
    with av.open(str(tmp_path / "b.avi")) as file:
        shown = [frame.time for frame in file.decode(video=0)]
    assert shown != sorted(shown), "otherwise this file tests nothing"
    clip = read_clip(str(tmp_path / "b.avi"), num_frames)
    indices = [(2 * i + 1) * 40 // (2 * num_frames) for i in range(num_frames)]
    np.testing.assert_allclose(clip.timestamps, [100_000 * i for i in indices])
    greys = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE).mean() for jpeg in clip.frames]
    np.testing.assert_allclose(greys, [20 + 5 * i for i in indices], atol=3)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0.0, 0.1, 0.2], [0.0, 0.1, 0.2]),
        ([-0.5, -0.4, -0.2], [0.0, 0.1, 0.3]),
        ([None, None, None], [0.0, 0.1, 0.2]),
        ([0.0, None, 0.3, None], [0.0, 0.1, 0.3, 0.4]),
        ([5.0, 5.0, 5.0], [0.0, 0.1, 0.2]),
        ([0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.5, 0.5]),
        ([0.0, 0.2, 0.4, 0.3, 0.6], [0.0, 0.2, 0.3, 0.4, 0.6]),
        ([7.0], [0.0]),
        ([None], [0.0]),
        # 30 frames, and 30 more whose times restart at zero
        ([i / 10 for i in range(30)] * 2, [i / 10 for i in range(60)]),
    ],
)
def test_timeline(times: list[float | None], expected: list[float]):
    np.testing.assert_allclose(timeline(times, 0.1), expected, atol=1e-9)


def kill_after(pid: int, seconds: float) -> None:
    threading.Timer(seconds, os.kill, (pid, signal.SIGKILL)).start()


def test_a_decoder_killed_before_its_first_file_is_started_again(tmp_path: Path):
    videos.write(tmp_path / "a.mp4")
    reader = Reader(30.0)
    reader._start()
    os.kill(reader._child.pid, signal.SIGSTOP)
    kill_after(reader._child.pid, 0.3)
    assert reader.read(tmp_path / "a.mp4", 4).decoded == 4
    reader._child.kill()
    reader._child.join()
    assert reader.read(tmp_path / "a.mp4", 4).decoded == 4, "killed between two files"
    os.kill(reader._child.pid, signal.SIGSTOP)
    kill_after(reader._child.pid, 0.3)
    with pytest.raises(Reject) as caught:
        reader.read(tmp_path / "a.mp4", 4)
    assert caught.value.reason == "unreadable" and "killed by signal 9" in caught.value.detail
    assert reader.read(tmp_path / "a.mp4", 4).decoded == 4, "the next file is read"
    reader.close()


def dies_at_start(pipe: object) -> None:
    os._exit(7)


def dies_on_files(pipe: object) -> None:
    pipe.send(("ready",))
    while True:
        pipe.recv()
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_decoder_that_cannot_start_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video_file, "_serve", dies_at_start)
    with pytest.raises(DecoderFailed, match=r"cannot start \(exit code 7; 3 tries\)"):
        Reader(30.0).read(videos.write(tmp_path / "a.mp4"), 4)


def test_a_decoder_that_dies_on_every_file_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(video_file, "_serve", dies_on_files)
    monkeypatch.setattr(video_file, "DEATHS", 2)
    reader = Reader(30.0)
    with pytest.raises(Reject, match="killed by signal 9"):
        reader.read(videos.write(tmp_path / "a.mp4"), 4)
    with pytest.raises(DecoderFailed, match="died on 2 consecutive files"):
        reader.read(videos.write(tmp_path / "b.mp4"), 4)


def test_time_to_start_is_not_counted_as_decoding(tmp_path: Path):
    reader = Reader(5.0)
    reader._start()
    os.kill(reader._child.pid, signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (reader._child.pid, signal.SIGCONT)).start()
    start = time.monotonic()
    assert reader.read(videos.write(tmp_path / "a.mp4"), 4).decoded == 4
    assert time.monotonic() - start > 0.4
    reader.close()
