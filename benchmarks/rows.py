"""Rows per second and memory of `build_shards` on very long lists: `python -m benchmarks.rows --missing 1000000 --clips 100000`.

The list of missing files shows what a row costs apart from its video: reading the CSV, finding the file, writing the reject and
publishing. One row of it has a file, so that the data set is published. The other list names one clip of 64 x 64 pixels and 8 frames under
as many names as it has rows (hard links). Prints one JSON object for each list:

    rows_per_s    rows over the seconds of the whole command, its start included
    cpu_s         seconds of processor time of all its processes; on a busy machine compare these
    driver_mb     highest resident memory of the process of the command itself
    workers_mb    highest sum of the resident memory of all processes below it
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import av
import numpy as np

ROOT = Path(__file__).parent.parent
MOST_LINKS = 50_000  # to one file; ext4 allows 65,000
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Follows memory and processor time of a process and all processes below it, four times a second."""

    def __init__(self, pid: int):
        self._pid, self._end = pid, threading.Event()
        self._cpu: dict[int, float] = {}  # process -> seconds
        self.driver_mb = self.workers_mb = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def cpu_seconds(self) -> float:
        """Processor time so far."""
        return sum(self._cpu.values())

    def stop(self) -> None:
        """End the watch."""
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(0.25):
            parents: dict[int, int] = {}
            pages: dict[int, int] = {}
            for folder in Path("/proc").glob("[0-9]*"):
                try:
                    fields = (folder / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                pid = int(folder.name)
                parents[pid], pages[pid] = int(fields[1]), int(fields[21])
                if self._below(pid, parents):
                    self._cpu[pid] = (int(fields[11]) + int(fields[12])) / TICKS
            below = [pid for pid in pages if pid != self._pid and self._below(pid, parents)]
            self.driver_mb = max(self.driver_mb, pages.get(self._pid, 0) * PAGE / 1e6)
            self.workers_mb = max(self.workers_mb, sum(pages[pid] for pid in below) * PAGE / 1e6)

    def _below(self, pid: int, parents: dict[int, int]) -> bool:
        while pid > 1 and pid != self._pid:
            pid = parents.get(pid, 0)
        return pid == self._pid


def write_clip(path: Path) -> None:
    """Write a clip of 8 frames, 64 x 64 pixels."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(8):
            picture = np.full((64, 64, 3), 20 + 25 * i, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_list(folder: Path, rows: int, *, present: bool) -> None:
    """Write `rows.csv` and `videos/` with the files of all rows or of the first one only."""
    videos = folder / "videos"
    videos.mkdir()
    for copy in range(-(-rows // MOST_LINKS) if present else 1):
        write_clip(folder / f"{copy}.mp4")
    with (folder / "rows.csv").open("w", encoding="utf-8") as file:
        file.write("video_id:FILE,title\n")
        for i in range(rows):
            file.write(f"{i // 1000:05d}/{i:08d}.mp4,第{i}个视频的标题\n")
            if i == 0 or present:
                (videos / f"{i // 1000:05d}").mkdir(exist_ok=True)
                os.link(folder / f"{i // MOST_LINKS}.mp4", videos / f"{i // 1000:05d}/{i:08d}.mp4")


def measure(rows: int, *, present: bool, workers: int, frames: int, scratch: str | None) -> dict:
    """Build one list and return what was measured."""
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        write_list(folder, rows, present=present)
        places = [f"--csv={folder / 'rows.csv'}", f"--video_root={folder / 'videos'}", f"--out={folder / 'out'}"]
        command = [
            sys.executable, "-m", "data_prep.build_shards", "--config=pretrain", *places,
            f"--num_frames={frames}", f"--workers={workers}",
        ]  # fmt: skip
        began = time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            watch = Watch(process.pid)
            code = process.wait()
            seconds = time.perf_counter() - began
            watch.stop()
        if code:
            raise SystemExit(f"build_shards ended with exit code {code}")
        manifest = json.loads((folder / "out" / "manifest.json").read_text())
        assert (manifest["rows"], manifest["written"]) == (rows, rows if present else 1)
        return {
            "rows": rows,
            "files": "one clip of 64 x 64 under all names" if present else "missing",
            "seconds": round(seconds, 1),
            "rows_per_s": round(rows / seconds),
            "cpu_s": round(watch.cpu_seconds, 1),
            "driver_mb": round(watch.driver_mb),
            "workers_mb": round(watch.workers_mb),
            "shards": len(manifest["splits"]["train"]["shards"]),
            "partition_rows": manifest["splits"]["train"]["partition_rows"],
            "workers": workers,
        }


def main() -> None:
    """Run the lists that the flags name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", type=int, nargs="*", default=[], help="rows of lists of missing files")
    parser.add_argument("--clips", type=int, nargs="*", default=[], help="rows of lists of one small clip")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="local processes")
    parser.add_argument("--num_frames", type=int, default=4, help="frames stored of each clip")
    parser.add_argument("--scratch", help="folder for the lists and the data sets; default: TMPDIR")
    args = parser.parse_args()
    for rows, present in [(rows, False) for rows in args.missing] + [(rows, True) for rows in args.clips]:
        found = measure(rows, present=present, workers=args.workers, frames=args.num_frames, scratch=args.scratch)
        print(json.dumps(found, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
