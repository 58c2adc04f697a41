"""The loader on shards against a PyTorch `DataLoader` on the video files, both giving four random frames a clip at 224 px.

    python -m benchmarks.torch_input [--csv CLIPS/pretrain.csv --video_root CLIPS] [--clips 96] [--workers 2] [--json FILE]

The DataLoader opens each file with PyAV. For each of four random times it seeks to the preceding keyframe (unless decoding is
already past it), decodes up to the frame, converts only this frame, and takes a random resized crop with OpenCV. Its processes
decode with one thread each and return uint8 batches. The loader reads shards that `data_prep.build_shards` made from the same files,
with the train transform or with a plain resize. The rows are measured in turn with the same number of clips, processes or threads,
after a warm-up round, and the median round is printed. Without --csv the program generates videos: ten seconds of a moving picture,
320 x 240 pixels, H.264 with a keyframe every two seconds.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from ymplug_jax.data import frames, loader, transforms
from ymplug_jax.data.records import Record, Records

ROOT = Path(__file__).parent.parent
SIZE = 224  # pixels
SHOWN = 4  # frames of a clip
BATCH = 8


class Clips(torch.utils.data.Dataset):
    """Four random frames of video files in time order: uint8[T, S, S, 3]. Files repeat up to `length`."""

    def __init__(self, files: list[str], length: int):
        self._files, self._length = files, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> torch.Tensor:
        rng = np.random.default_rng(i)
        with av.open(self._files[i % len(self._files)], metadata_errors="ignore") as container:
            stream = container.streams.video[0]
            stream.thread_count = 1  # the processes already use all cores
            seconds = stream.duration * stream.time_base if stream.duration else container.duration / av.time_base
            first = float((stream.start_time or 0) * stream.time_base)
            # A random time in each quarter; 0.95 avoids the end, where some files have no frame.
            times = first + (np.arange(SHOWN) + rng.random(SHOWN)) / SHOWN * float(seconds) * 0.95
            shown = [frame.to_ndarray(format="rgb24") for frame in frames_at(container, stream, times)]
        height, width = shown[0].shape[:2]
        top, left, h, w = transforms.choose_crop(height, width, rng)
        parts = [cv2.resize(image[top : top + h, left : left + w], (SIZE, SIZE)) for image in shown]
        return torch.from_numpy(np.stack(parts))


def frames_at(
    container: "av.container.InputContainer", stream: "av.video.stream.VideoStream", times: np.ndarray
) -> Iterator["av.VideoFrame"]:
    """The first frame at or after each time, or the last frame of the file; `times` are seconds in ascending order.

    It seeks only if a keyframe lies between the current frame and the wanted one; otherwise a seek would decode frames again.
    """
    frame, decoded = None, iter(())
    for seconds in times:
        wanted = int(seconds / stream.time_base)
        entry = stream.index_entries.search_timestamp(wanted)
        if frame is None or frame.pts is None or entry < 0 or stream.index_entries[entry].timestamp > frame.pts:
            try:
                container.seek(wanted, stream=stream)  # to the keyframe before it
            except av.FFmpegError:  # the file has no usable index: decode from the start
                container.seek(0)
            decoded = container.decode(stream)
        if frame is None or frame.time is None or frame.time < seconds:
            for frame in decoded:
                if frame.time is None or frame.time >= seconds:
                    break
        if frame is None:
            raise ValueError(f"{container.name}: no frame decodes")
        yield frame


def start_worker(_: int) -> None:
    cv2.setNumThreads(0)
    torch.set_num_threads(1)


class Peer:
    """A DataLoader with persistent workers; each pass yields all clips."""

    def __init__(self, files: list[str], clips: int, workers: int):
        self._loader = torch.utils.data.DataLoader(
            Clips(files, clips), BATCH, num_workers=workers, persistent_workers=True, worker_init_fn=start_worker,
            multiprocessing_context="spawn",
        )  # fmt: skip
        self._clips = clips

    def __call__(self) -> int:
        return sum(len(batch) for batch in self._loader)


class Ours:
    """The loader on shards; each pass yields `clips` clips, repeating records."""

    def __init__(self, path: Path, clips: int, threads: int, train: bool):
        self._records, self._clips, self._threads, self._train = Records(str(path), "train"), clips, threads, train

    def _example(self, record: Record, rng: np.random.Generator) -> dict[str, np.ndarray]:
        clip = frames.Decoded(record.frames, frames.choose_frames(SHOWN, len(record.frames), rng))
        return {
            "video": transforms.train_transform(clip, SIZE, rng)
            if self._train
            else transforms.eval_transform(clip, SIZE)
        }

    def __call__(self) -> int:
        stream = loader.batches(
            self._records, self._example, seed=0, batch_size=BATCH, rows=range(BATCH), shuffle=True, threads=self._threads,
        )  # fmt: skip
        given = 0
        while given < self._clips:
            given += len(next(stream)["video"])
        stream.close()
        return given


def draw(folder: Path, count: int) -> Path:
    """Videos of a moving, textured picture, ten seconds each, and their CSV."""
    rng = np.random.default_rng(0)
    names = [f"{i}.mp4" for i in range(count)]
    for name in names:
        picture = cv2.resize(
            rng.integers(0, 256, (40, 60, 3), dtype=np.uint8), (600, 400), interpolation=cv2.INTER_CUBIC
        )
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=25, options={"preset": "veryfast", "g": "50"})
            stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
            for t in range(250):
                part = np.ascontiguousarray(picture[t // 2 : t // 2 + 240, t : t + 320])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(part, format="rgb24")))
            container.mux(stream.encode(None))
    table = folder / "pretrain.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("video_id:FILE", "title"), *((name, "标题") for name in names)])
    return table


def measure(table: Path, root: Path, shards: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Name of a row -> clips per second in each round."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        files = [str(root / row["video_id:FILE"]) for row in csv.DictReader(file)]
    rows: dict[str, tuple[int, Callable[[], int]]] = {
        "DataLoader + PyAV": (args.clips, Peer(files, args.clips, args.workers)),
        "loader, plain resize": (16 * args.clips, Ours(shards, 16 * args.clips, args.workers, train=False)),
        "loader, train transform": (16 * args.clips, Ours(shards, 16 * args.clips, args.workers, train=True)),
    }
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(args.rounds + 1):
        for name, (clips, run) in rows.items():
            began = time.perf_counter()
            given = run()
            seconds = time.perf_counter() - began
            if given != clips:
                raise ValueError(f"{name}: {given} clips, expected {clips}")
            if number:  # the first round starts the processes and is a warm-up
                rates[name].append(clips / seconds)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.torch_input", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--csv", type=Path, help="pretrain.csv whose clips can all be decoded; default: generated clips"
    )
    parser.add_argument("--video_root", type=Path, help="folder that the FILE column is relative to")
    parser.add_argument(
        "--clips",
        type=int,
        default=48,
        help="clips per measurement of the DataLoader; the shard loader reads 16 times as many",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="DataLoader processes, and threads of the shard loader"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    if (args.csv is None) != (args.video_root is None):
        parser.error("--csv and --video_root go together")
    if args.clips % BATCH:
        parser.error(f"--clips {args.clips}: give a multiple of the batch, {BATCH}")
    with tempfile.TemporaryDirectory() as folder:
        root = args.video_root or Path(folder)
        table = args.csv or draw(root, 24)
        shards = Path(folder) / "shards"
        flags = ["--config=pretrain", f"--csv={table}", f"--video_root={root}", f"--out={shards}"]
        subprocess.run(
            [sys.executable, "-m", "data_prep.build_shards", *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        rates = measure(table, root, shards, args)
    cores = min(args.workers, os.cpu_count() or 1)
    found = {name: statistics.median(values) for name, values in rates.items()}
    base = found["DataLoader + PyAV"]
    print(f"{SHOWN} frames a clip at {SIZE} px, {args.workers} workers on {cores} cores")
    print(f"{'':26} clips/s  (rounds, from - to)  clips/s/core  of the peer")
    for name, rate in found.items():
        spread = f"({min(rates[name]):.1f} - {max(rates[name]):.1f})"
        print(f"{name:26} {rate:7.1f}  {spread:>20}  {rate / cores:12.1f}  {rate / base:9.1f} x")
    report = {
        "frames": SHOWN,
        "workers": args.workers,
        "cores": cores,
        "torch": torch.__version__,
        "av": av.__version__,
    }
    report |= {"clips_per_second": {name: [round(rate, 1) for rate in values] for name, values in rates.items()}}
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
