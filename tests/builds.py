"""Builds of shards as commands that tests start, kill and compare."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import videos

ROOT = Path(__file__).parent.parent
COLUMNS = "video_id:FILE,title"


def corpus(folder: Path, rows: int) -> tuple[Path, Path]:
    """Write three clips and a CSV that names them again and again, with a missing file in every seventh row; return (csv, root)."""
    root = folder / "root"
    for i in range(3):
        videos.write(root / f"{i}.mp4", frames=20 + i)
    names = [f"{i % 3}.mp4" if i % 7 else f"none{i}.mp4" for i in range(rows)]
    csv = videos.write_csv(folder / "clips.csv", COLUMNS, [(name, f"第{i}个") for i, name in enumerate(names)])
    return csv, root


def flags(csv: Path | str, root: Path | str, out: Path | str, *more: str) -> list[str]:
    places = [f"--csv={csv}", f"--video_root={root}", f"--out={out}"]
    return ["--config=pretrain", *places, "--num_frames=4", "--partition_rows=10", *more]


def start(given: list[str]) -> subprocess.Popen:
    """Start a build in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "data_prep.build_shards", *given],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen, seconds: float = 240) -> tuple[int, str, str]:
    """Wait for a build and return (exit code, stdout, stderr). A build that hangs is killed, and the test fails."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def wait_for(process: subprocess.Popen, count: Callable[[], int], least: int, seconds: float = 120) -> None:
    """Wait until `count` gives `least` finished partitions."""
    end_of_wait = time.monotonic() + seconds
    while count() < least:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end_of_wait, "no progress"
        time.sleep(0.02)


def descendants(pid: int) -> dict[int, str]:
    """Return {process: command line} of all processes below one."""
    found: dict[int, str] = {}
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        try:
            for child in map(int, (thread / "children").read_text().split()):
                found[child] = Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found |= descendants(child)
        except OSError:
            continue  # it has ended
    return found


def kill_a_worker(process: subprocess.Popen, seed: int) -> None:
    """Kill one of the child processes in which Beam runs the steps, at random."""
    own = (
        int(pid) for file in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in file.read_text().split()
    )
    workers = [pid for pid in own if "spawn_main" in descendants(process.pid)[pid]]
    os.kill(random.Random(seed).choice(workers), signal.SIGKILL)


def kill_the_driver(process: subprocess.Popen) -> list[int]:
    """Kill the command itself, and return its descendants, which must end by themselves."""
    below = list(descendants(process.pid))
    process.kill()
    process.communicate()
    return below


def wait_until_gone(pids: list[int], seconds: float = 20) -> None:
    """Wait until none of the processes runs; a zombie does not."""
    end_of_wait = time.monotonic() + seconds
    for pid in pids:
        while Path(f"/proc/{pid}/stat").exists() and ") Z" not in Path(f"/proc/{pid}/stat").read_text():
            assert time.monotonic() < end_of_wait, f"process {pid} goes on after the driver was killed"
            time.sleep(0.05)


def content(out: Path) -> dict[str, bytes]:
    """Return {name: bytes} of a data set."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
