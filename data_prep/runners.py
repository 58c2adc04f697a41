"""Runs the Beam graph of a build and ends well when workers die: choice of the runner, jobs side by side, watchdog, repetition.

Beam's local runners and its job service (2.77) wait for ever for a worker process that was killed. Therefore every job runs in a child
process of this one, which notices that the child ended, or that nothing moved for too long, and runs the job again. A graph must build
only what is missing, so that a job can be repeated at any time.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Hashable
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from data_prep.beam_flags import SERVICES, flag_value, pools, runner_of

TRIES = 3  # attempts of a job in a row that finish no partition
LOCAL = "BundleBasedDirectRunner"  # runs a graph in the process that starts it
END = 30.0  # seconds that a job may take to cancel itself and to end

Graph = Callable[[Any, int, int], object]
"""`graph(pipeline, share, shares)` adds the steps that build the missing partitions i with i % shares == share. It can be pickled."""

State = Callable[[int, int], tuple[int, Hashable]]
"""`state(share, shares)` is the number of missing partitions of that share, and a value that changes while its workers are at work."""


class PlaceError(RuntimeError):
    """A disk, a folder or a machine failed during the build. The message names it; the same command resumes."""


class Run(NamedTuple):
    """How the graph is run."""

    flags: tuple[str, ...]  # of Beam, with --runner
    jobs: int  # Beam jobs side by side, each with its share of the partitions
    submitted: bool  # a service runs the job, which must be cancelled there


def choose(flags: list[str], workers: int | None, partitions: int) -> Run:
    """Choose the runner and the number of jobs.

    Args:
      flags: flags of Beam as given by the user.
      workers: processes on this machine, or jobs of a job service. None: all cores here; there a job for each address of a pool.
      partitions: missing partitions; there are no more jobs than these.
    """
    runner = runner_of(flags)
    if flag_value(flags, "--default_sdk_harness_log_level") is None:
        flags = [*flags, "--default_sdk_harness_log_level=WARNING"]
    if runner is None:
        jobs = min(workers or os.cpu_count() or 1, partitions)
        return Run((*flags, f"--runner={LOCAL}"), max(jobs, 1), False)
    return Run(tuple(flags), max(min(workers or len(pools(flags)) or 1, partitions), 1), runner in SERVICES)


def run(graph: Graph, state: State, how: Run, stall: float) -> None:
    """Run all jobs to their end. Repeats a job whose worker was lost, at most TRIES times in a row without a finished partition.

    Args:
      graph: adds the steps of a job, see `Graph`.
      state: what is left of a job, see `State`.
      how: the runner and the number of jobs.
      stall: seconds without any change of a job's state after which it counts as lost.

    Raises:
      PlaceError: a disk or a machine failed, or workers were lost too often.
      RuntimeError: any other error of a job, with its traceback.
    """
    if how.jobs == 1 and flag_value(how.flags, "--runner") == LOCAL:
        try:
            _submit(graph, how.flags, 0, 1)
        except Exception as error:
            _raise_failed(f"{type(error).__name__}: {error}")
            raise
        return
    jobs = [_Job(graph, state, how, share) for share in range(how.jobs)]
    try:
        while running := [job for job in jobs if not job.done]:
            wait([job.answer for job in running], timeout=min(5.0, stall / 4))
            for job in running:
                job.look(stall)
    finally:
        for job in jobs:
            job.end()


class _Job:
    """A share of the partitions and the child process that builds it."""

    def __init__(self, graph: Graph, state: State, how: Run, share: int):
        self._graph, self._state, self._how, self._share = graph, state, how, share
        self._tries, self._left = 0, sys.maxsize
        self.done = False
        self._start()

    def _start(self) -> None:
        left, self._beat = self._state(self._share, self._how.jobs)
        self._tries = 1 if left < self._left else self._tries + 1
        self._left, self._moved = left, time.monotonic()
        context = multiprocessing.get_context("spawn")  # forking a process with threads could deadlock
        self.answer, theirs = context.Pipe(duplex=False)
        what = (self._graph, self._how, self._share, theirs)
        self._process = context.Process(target=_serve, args=what, name=f"job {self._share}")
        self._process.start()
        theirs.close()  # so that the death of the child ends the pipe

    def look(self, stall: float) -> None:
        """Note the end or the loss of the job, and start it again if it was lost. Raises as `run`."""
        if self.answer.poll():
            try:
                found: tuple[str, str] | None = self.answer.recv()
            except (EOFError, OSError):
                self.end()
                return self._again(f"a worker process {_cause(self._process.exitcode)}")
            self.end()
            if found is None:
                self.done = True
                return None
            _raise_failed(found[0])
            if not self._how.submitted:
                raise RuntimeError(f"the build failed\n{found[1]}")
            return self._again(_last_line(found[0]))
        _, beat = self._state(self._share, self._how.jobs)
        if beat != self._beat:
            self._beat, self._moved = beat, time.monotonic()
        elif time.monotonic() - self._moved > stall:
            self.end()
            return self._again(f"no row was finished for {stall / 60:.3g} minutes, so its worker seems lost")
        return None

    def _again(self, what: str) -> None:
        left, _ = self._state(self._share, self._how.jobs)
        where = f"--runner {flag_value(self._how.flags, '--runner')}" if self._how.submitted else "--workers"
        if left >= self._left and self._tries >= TRIES:
            fix = "check its workers and their memory" if self._how.submitted else "the machine may be short of memory"
            raise PlaceError(
                f"{where}: {what}; {TRIES} attempts in a row finished no partition; {fix}, then run the same command again"
            )
        print(f"{where}: {what}; {left} missing partitions are built again", file=sys.stderr)
        self._start()

    def end(self) -> None:
        """End the child process. A submitted job is cancelled first."""
        self.answer.close()
        if self._process.is_alive() and self.done:
            self._process.join(END)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(END)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


class _Stopped(BaseException):
    """The parent asked this process to cancel its job and to end."""


def _serve(graph: Graph, how: Run, share: int, answer: Connection) -> None:
    """Run one job in a child process. Answer None, or the error and its traceback."""
    logging.getLogger().addHandler(logging.NullHandler())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent decides
    if how.submitted:
        signal.signal(signal.SIGTERM, _stop)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    found: tuple[str, str] | None = None
    try:
        addresses = pools(how.flags)
        more = [f"--environment_config={addresses[share % len(addresses)]}"] if addresses else []
        _submit(graph, (*how.flags, *more), share, how.jobs)
    except _Stopped:
        return
    except BaseException as error:
        found = f"{type(error).__name__}: {error}", traceback.format_exc()
    answer.send(found)


def _stop(*_: object) -> None:
    raise _Stopped


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, also by SIGKILL."""
    wait([parent])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END)
    os._exit(1)


def _submit(graph: Graph, flags: tuple[str, ...], share: int, shares: int) -> None:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    pipeline = beam.Pipeline(options=PipelineOptions(list(flags), save_main_session=False))
    graph(pipeline, share, shares)
    result = pipeline.run()
    try:
        result.wait_until_finish()
    except _Stopped:
        result.cancel()
        raise


def _raise_failed(text: str) -> None:
    """Raise PlaceError if the text, an error as Beam passes it between processes, is that of a failed disk or machine."""
    from data_prep.builder import FAILED

    if found := FAILED.search(text):
        raise PlaceError(f"{found[1]}; fix this and run the same command again") from None


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}"


def _last_line(text: str) -> str:
    """Return the last line of an error of Beam, which holds the traceback of the worker."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "failed without a message"
