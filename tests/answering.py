"""Tiny runs of the three tasks that answer questions about videos, shared by the tests of `predict` and of the Python API."""

import subprocess
import sys
from pathlib import Path

import runs
import shards

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent / "data_prep"))
import videos  # noqa: E402  the drawn test videos

SMALL = [flag for flag in runs.SMALL if "max_tokens" not in flag and "vocab" not in flag]
SMALL += ["--config.model.llm.vocab=300", "--config.data.max_tokens=40", "--config.train.duration=3 steps"]


def python(*command: str, code: int = 0) -> subprocess.CompletedProcess:
    """`python -m` with these arguments, which must end with this exit code."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=runs.environment(), text=True, capture_output=True, timeout=300
    )
    assert done.returncode == code, done.stderr
    return done


def train(home: Path, task: str, workdir: str = "", data: list[str] | None = None) -> list[str]:
    """Train three steps of a task in HOME/workdir. Returns the flags that name its data."""
    data = data or runs.make_data(home)
    kind = {"classify": "classification", "caption": "captioning", "retrieve": "retrieval"}[task]
    shards.call(home / "data", kind)
    more = ["--config.options.new_tokens=6"] if task == "caption" else []
    place = home / (workdir or task)
    python("ymplug_jax.main", f"--config=configs/tiny/{task}.py", f"--workdir={place}", *data, *SMALL, *more)
    return data


def draw_videos(folder: Path, *names: str) -> list[Path]:
    """Short videos of these names."""
    return [videos.write(folder / name) for name in names]
