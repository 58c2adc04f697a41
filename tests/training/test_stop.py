"""Reasons for a run to end early: signals, failing disks or buckets, and values that are not finite."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ymplug_jax.core import checkpoint_files
from ymplug_jax.core.exits import PlaceFailed
from ymplug_jax.data.records import CorruptRecord
from ymplug_jax.training import stop
from ymplug_jax.training.step import TrainingStopped


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_requests_a_stop(number: int):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop.Stop() as asked:
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # nothing to save yet
        asked.listen()
        assert not asked.asked(1)
        os.kill(os.getpid(), number)
        assert asked.asked(1)
        if number == signal.SIGINT:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the second one ends the process
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_aborts_an_evaluation():
    done = []
    with stop.Stop() as asked:
        asked.listen()
        with asked.at_once():
            done.append("begun")
            os.kill(os.getpid(), signal.SIGINT)
            done.append("went on")
        assert asked.asked(1) and done == ["begun"]


def test_a_second_ctrl_c_ends_the_process():
    program = (
        "import os, signal\nfrom ymplug_jax.training.stop import Stop\nwith Stop() as stop:\n    stop.listen()\n"
        "    for i in range(2):\n        os.kill(os.getpid(), signal.SIGINT)\n        print('still here', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "still here\n", "")


def test_data_that_can_no_longer_be_read():
    with (
        pytest.raises(PlaceFailed, match=r"^/gone/x: can no longer be read \(No such file or directory\); restore"),
        stop.reading("/data"),
    ):
        Path("/gone/x").read_bytes()
    with (
        pytest.raises(PlaceFailed, match=r"^/data: can no longer be read .OSError: .Errno 5. Input/output error"),
        stop.reading("/data"),
    ):  # the text that Grain passes on from a worker process
        raise RuntimeError("Grain worker failed:\n  File x\nOSError: [Errno 5] Input/output error\n")
    with pytest.raises(CorruptRecord, match=r"^/data/x: record 3 at byte 9: cut$"), stop.reading("/data"):
        raise RuntimeError(
            "Grain worker failed:\n  File x\nymplug_jax.data.records.CorruptRecord: /data/x: record 3 at byte 9: cut\n"
        )
    with pytest.raises(RuntimeError, match="a bug"), stop.reading("/data"):
        raise RuntimeError("a bug")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ValueError("UNKNOWN: Error writing local file: write: No space left on device [OS error 28: ENOSPC]"),
    ],
)
def test_a_folder_that_can_no_longer_be_written(error: Exception):
    with (
        pytest.raises(PlaceFailed, match=r"^runs/x: cannot be written \(No space left on device\)[^\n]*$"),
        checkpoint_files.place_of(checkpoint_files.folder_of("runs/x")),
    ):
        raise error
    with pytest.raises(ValueError, match="a bug"), checkpoint_files.place_of(checkpoint_files.folder_of("runs/x")):
        raise ValueError("a bug")


def test_a_batch_without_targets_is_named():
    stop.must_have_targets(7, 1.0)
    with pytest.raises(TrainingStopped, match=r"^step 7: no example of the batch has a target"):
        stop.must_have_targets(7, 0.0)


def test_scores_that_are_not_finite():
    nan, inf = float("nan"), float("inf")
    assert stop.finite_scores(3, {"loss": 1.5, "masked": nan}, "validation") == {"loss": 1.5}
    for values, name in (
        ({"loss": nan}, "loss of the evaluation is nan"),
        ({"loss": 1.0, "x": inf}, "x of the evaluation is inf"),
    ):
        with pytest.raises(TrainingStopped, match=f"^step 3: {name}; .*'validation'"):
            stop.finite_scores(3, values, "validation")
