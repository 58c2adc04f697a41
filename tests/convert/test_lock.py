"""Two conversions never write into one folder, and Ctrl-C ends a conversion with one line."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import torch_sources
from ymplug_jax.convert import __main__ as command
from ymplug_jax.convert import lock, to_torch
from ymplug_jax.core import exits

ROOT = Path(__file__).parents[2]
LOCK = ".convert.lock"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"width": 96, "depth": 3, "vocab": 101, "positions": 40}
    (file,) = torch_sources.megatron(tmp_path_factory.mktemp("gpt3"), dtype=torch.float16, **sizes)
    return file


def argv(source: Path, out: Path) -> list[str]:
    return ["--model", "gpt3", "--source", str(source), "--out", str(out), "--heads", "llm=4"]


def owner(**changes: object) -> str:
    """Content of a lock file: this process, with changes."""
    return json.dumps(lock._owner(os.getpid()) | changes)


def ended_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_the_lock_is_there_while_it_is_held(tmp_path: Path) -> None:
    with lock.held(tmp_path / "new" / "out"):
        facts = json.loads((tmp_path / "new" / "out" / LOCK).read_text())
        assert facts["process"] == os.getpid() and facts["host"] == socket.gethostname()
    assert list(tmp_path.iterdir()) == []  # created folders that stayed empty are removed too


def test_a_second_conversion_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """In both directions, while another process runs on this host or may run on another host."""
    assert command.main(argv(source, tmp_path / "converted")) == 0
    back = ["--model", "gpt3", "--source", str(tmp_path / "converted"), "--to", "torch", "--out", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    running = lock._owner(os.getppid())
    for held in (running, running | {"host": "elsewhere", "process": 7}):
        (tmp_path / "out" / LOCK).write_text(json.dumps(held))
        for given in (argv(source, tmp_path / "out"), back):
            capsys.readouterr()
            assert command.main(given) == exits.MISTAKE
            assert capsys.readouterr().err.splitlines()[-1] == (
                f"error: --out {tmp_path}/out: process {held['process']} on {held['host']} is converting into this folder; "
                f"wait for it, or remove {tmp_path}/out/{LOCK} if that process is gone"
            )
            assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK]
    assert json.loads((tmp_path / "out" / LOCK).read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("left", ["ended", "number in use again", "cut short", "empty"])
def test_a_lock_of_a_process_that_is_gone_is_taken_over(source: Path, tmp_path: Path, left: str) -> None:
    content = {
        "ended": lambda: owner(process=ended_process()),
        "number in use again": lambda: owner(started="1"),
        "cut short": lambda: owner()[:20],
        "empty": lambda: "",
    }[left]()
    (tmp_path / LOCK).write_text(content)
    assert command.main(argv(source, tmp_path)) == 0
    assert (tmp_path / "checkpoints" / "converted").is_dir() and not (tmp_path / LOCK).exists()


def test_a_lock_that_another_process_took_stays(tmp_path: Path) -> None:
    with lock.held(tmp_path):
        (tmp_path / LOCK).write_text(owner(host="elsewhere"))
    assert (tmp_path / LOCK).exists()


def test_one_of_many_processes_holds_the_lock(tmp_path: Path) -> None:
    """All find the lock of a process that has ended, and start at the same time."""
    (tmp_path / LOCK).write_text(owner(process=ended_process()))
    code = f"""
import sys
from pathlib import Path
from ymplug_jax.convert import lock
from ymplug_jax.core import exits
sys.stdin.readline()
try:
    with lock.held(Path({str(tmp_path)!r})):
        print("held", flush=True)
        sys.stdin.readline()
except exits.Mistake:
    print("refused", flush=True)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(6)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sorted(process.stdout.readline() for process in processes) == ["held\n"] + 5 * ["refused\n"]
    for process in processes:
        process.communicate("end\n")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_the_command_with_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A real SIGINT in the middle of the writing: exit code 130, no traceback, no lock, and the next call continues."""
    slow = f"""
import sys, time
from ymplug_jax.convert import __main__ as command
from ymplug_jax.convert import to_orbax
real = to_orbax.Store.write
def write(*args):
    real(*args)
    print("wrote", flush=True)
    time.sleep(0.2)
to_orbax.Store.write = write
sys.exit(command.main({argv(source, tmp_path / "out")!r}))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", slow], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for _ in range(5):
        process.stdout.readline()
    assert json.loads((tmp_path / "out" / LOCK).read_text())["process"] == process.pid
    assert command.main(argv(source, tmp_path / "out")) == exits.MISTAKE
    assert f"process {process.pid} on " in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == exits.STOPPED == 130
    assert said.splitlines()[-1] == "stopped; run the same command again to continue" and "Traceback" not in said
    assert (tmp_path / "out" / "checkpoints" / "converted.partial").is_dir()
    assert not (tmp_path / "out" / LOCK).exists()
    assert command.main(argv(source, tmp_path / "out")) == 0


def test_ctrl_c_does_not_wait_for_the_hashes_of_the_source(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing a large model takes minutes."""
    from ymplug_jax.convert import to_orbax

    def endless(opened: object, ended: object) -> dict[str, str]:
        assert ended.wait(timeout=60)
        return {}

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(to_orbax, "_digests", endless)
    monkeypatch.setattr(to_orbax.Store, "write", interrupted)
    began = time.monotonic()
    assert command.main(argv(source, tmp_path / "out")) == exits.STOPPED
    assert time.monotonic() - began < 50


def test_ctrl_c_on_the_way_back_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The second of two files is interrupted: the first is removed, so that the repeated command does not refuse it."""
    (bloom,) = torch_sources.bloom(tmp_path / "bloom", width=64, depth=3, heads=4, vocab=97, dtype=torch.float32)
    adapter = torch_sources.adapter(tmp_path / "lora", width=64, depth=3, rank=4, alpha=16)
    given = ["--model", "bloom", "--source", str(bloom), "--lora", str(adapter), "--keep_lora", "--out"]
    assert command.main([*given, str(tmp_path / "converted"), "--heads", "llm=4"]) == 0
    real = to_torch._write

    def interrupted(file: Path, *args: object) -> None:
        if file.name.startswith("adapter"):
            assert (tmp_path / "back" / "model.safetensors").exists()
            raise KeyboardInterrupt
        real(file, *args)

    back = ["--model", "bloom", "--source", str(tmp_path / "converted"), "--to", "torch", "--out"]
    monkeypatch.setattr(to_torch, "_write", interrupted)
    assert command.main([*back, str(tmp_path / "back")]) == exits.STOPPED
    expected = "stopped; no file was written, run the same command again to start over"
    assert capsys.readouterr().err.splitlines()[-1] == expected and not (tmp_path / "back").exists()
    monkeypatch.setattr(to_torch, "_write", real)
    assert command.main([*back, str(tmp_path / "back")]) == 0
