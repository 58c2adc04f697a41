"""Shard building against bare PyAV decoding of the same frames, on the same cores, in turn: `python -m benchmarks.data_prep`.

Bare decoding opens each clip, decodes up to the last frame that the builder stores, and converts the stored frames to RGB: no
resizing, JPEG encoding, checks or output files. The builder is the real command, run on a small and a large number of rows. Its
steady rate is the difference in rows over the difference in time, which excludes the start of Beam; the start is printed separately.
"""

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import av

from ymplug_jax.data.video_file import spaced

ROOT = Path(__file__).parent.parent


def decode(path: str) -> int:
    """Bare decoding of 16 evenly spaced frames of one file."""
    with av.open(path, metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        count = sum(bool(packet.size) for packet in container.demux(stream))
        container.seek(0)
        wanted = set(spaced(16, count))
        kept = []
        for i, frame in enumerate(container.decode(stream)):
            if i in wanted:
                kept.append(frame.to_ndarray(format="rgb24"))
            if i >= max(wanted):
                break
        return len(kept)


def bare(files: list[str], workers: int) -> float:
    """Seconds for all files with a warm process pool."""
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.map(decode, files[:workers])
        began = time.perf_counter()
        pool.map(decode, files, chunksize=4)
        return time.perf_counter() - began


def build(names: list[str], root: Path, workers: int) -> float:
    """Seconds of the whole command."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "x.csv"
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("video_id:FILE", "title"), *((name, "标题") for name in names)])
        flags = [
            "--config=pretrain",
            f"--csv={table}",
            f"--video_root={root}",
            f"--out={folder}/out",
            f"--workers={workers}",
        ]
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "data_prep.build_shards", *flags, "--partition_rows=32"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="pretrain.csv whose clips can all be decoded")
    parser.add_argument("--video_root", type=Path, required=True)
    parser.add_argument(
        "--rows", type=int, default=256, help="rows of the larger build; the smaller build has a quarter of them"
    )
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with args.csv.open(encoding="utf-8-sig", newline="") as file:
        listed = [row["video_id:FILE"] for row in csv.DictReader(file)]
    names = [listed[i % len(listed)] for i in range(args.rows)]
    workers = os.cpu_count() or 1
    some = len(names) // 4
    rates: dict[str, list[float]] = {"bare PyAV": [], "builder, steady": [], "builder, whole command": []}
    for _ in range(args.rounds):
        files = [str(args.video_root / name) for name in names]
        seconds = bare(files[some:], workers)
        rates["bare PyAV"].append((len(names) - some) / seconds)
        short, whole = build(names[:some], args.video_root, workers), build(names, args.video_root, workers)
        rates["builder, steady"].append((len(names) - some) / (whole - short))
        rates["builder, whole command"].append(len(names) / whole)
    base = statistics.median(rates["bare PyAV"])
    result = {
        name: {
            "clips_per_s": round(statistics.median(values), 2),
            "of_bare": round(statistics.median(values) / base, 3),
        }
        for name, values in rates.items()
    }
    for name, values in result.items():
        print(
            f"{name:<24} {values['clips_per_s']:>8.2f} clips/s  {100 * values['of_bare']:.0f} %  {[round(v, 1) for v in rates[name]]}"
        )
    print(json.dumps({"rows": args.rows, "workers": workers, **result}))


if __name__ == "__main__":
    main()
