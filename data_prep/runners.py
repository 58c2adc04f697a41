"""Runs the Beam jobs of a build and ends well when workers die: choice of the runner, jobs side by side, watchdog, repetition.

Beam's local runners and its job service (2.77) wait for ever for a worker process that was killed. Therefore every job runs in a child
process, and this one notices that the child ended, or that nothing moved for too long, and runs the job again: finished partitions stay.
A job of the local runner or of the job service has one worker, so several jobs side by side build a share of the partitions each, and
then merge the facts of a share of the groups.
"""

import os
import re
import secrets
import sys
import time
from multiprocessing.connection import wait
from typing import NamedTuple

from etils import epath

from data_prep.beam_flags import SERVICES, flag_value, pools, runner_of
from data_prep.beam_process import BeamProcess, RunnerFailed, submit
from data_prep.build_flags import PlaceError
from data_prep.part_files import GROUP, TOKEN, finished
from data_prep.partition import FAILED, Job
from ymplug_jax.core import places

TRIES = 3  # attempts of a job in a row that finish no partition
LOCAL = "BundleBasedDirectRunner"  # runs a graph in the process that starts it
LOOK_LOCAL, LOOK_BUCKET = 5.0, 60.0  # seconds between two looks into the work folder


class How(NamedTuple):
    """How the jobs are run."""

    flags: tuple[str, ...]  # of Beam, with --runner
    jobs: int  # Beam jobs side by side
    submitted: bool  # a service runs the jobs


def choose(flags: list[str], workers: int | None, partitions: int) -> How:
    """Choose the runner and the number of jobs.

    Args:
      flags: flags of Beam as given by the user.
      workers: processes on this machine, or jobs of a job service. None: all cores here; there a job for each address of a pool.
      partitions: number of partitions; there are no more jobs than these.
    """
    runner = runner_of(flags)
    if flag_value(flags, "--default_sdk_harness_log_level") is None:
        flags = [*flags, "--default_sdk_harness_log_level=WARNING"]
    if runner is None:
        return How((*flags, f"--runner={LOCAL}"), max(min(workers or os.cpu_count() or 1, partitions), 1), False)
    return How(tuple(flags), max(min(workers or len(pools(flags)) or 1, partitions), 1), runner in SERVICES)


def run(job: Job, partitions: int, beam_flags: list[str], workers: int | None, stall: float) -> None:
    """Build and merge the partitions that are missing. Repeats a job whose worker was lost.

    Args:
      job: of the build; `step`, `share`, `shares` and `token` are set here.
      partitions: number of all partitions.
      beam_flags: flags of Beam; without `--runner` the build runs on this machine.
      workers: see `choose`.
      stall: seconds without a finished row after which a job counts as lost.

    Raises:
      PlaceError: a disk, a bucket or a machine failed, or workers were lost TRIES times in a row without a finished partition.
      RunnerFailed: any other error of a job, with its traceback.
      OSError: the work folder cannot be read or written.
    """
    how = choose(beam_flags, workers, partitions)
    groups = -(-partitions // GROUP)
    for step in ("all",) if how.jobs == 1 else ("build", "merge"):
        folder = _Folder(job.work, partitions, step)
        whole = job._replace(step=step)
        if not folder.missing(whole):
            continue
        job = whole._replace(shares=min(how.jobs, groups) if step == "merge" else how.jobs)
        if how.jobs == 1 and flag_value(how.flags, "--runner") == LOCAL:
            _run_here(job, how.flags)
        else:
            _run_side_by_side(job, folder, how, stall)
        folder.look()
        if folder.missing(whole):
            raise RunnerFailed(f"{job.work}: Beam ended without building the partitions")


def _run_here(job: Job, flags: tuple[str, ...]) -> None:
    job = job._replace(token=secrets.token_hex(8))
    places.write_text(epath.Path(job.work) / TOKEN, job.token)
    try:
        submit(job, flags)
    except RunnerFailed as error:
        _raise_failed(str(error))
        raise


def _run_side_by_side(job: Job, folder: "_Folder", how: How, stall: float) -> None:
    """Run a job of each share to its end. Raises as `run`."""
    shares = [_Share(job._replace(share=share), folder, how) for share in range(job.shares)]
    seconds = min(LOOK_BUCKET if places.is_remote(folder.path) else LOOK_LOCAL, stall / 4)
    try:
        for share in shares:
            share.start(shares)
        while running := [(share, share.process.answer) for share in shares if share.process is not None]:
            ready = wait([answer for _, answer in running], timeout=seconds)
            folder.look()
            for share, answer in running:
                lost = share.ended() if answer in ready else share.stalled(stall)
                if lost:
                    share.start(shares)
    finally:
        for share in shares:
            if share.process is not None:
                share.process.stop()


class _Folder:
    """The last listing of the work folder."""

    def __init__(self, work: str, partitions: int, step: str):
        self.path, self._step = epath.Path(work), step
        self._all = [set(range(partitions)), set(range(-(-partitions // GROUP)))]
        self.look()

    def look(self) -> None:
        """List the folder. Raises OSError."""
        parts, groups, files = finished(self.path)
        self._missing = [wanted - found for wanted, found in zip(self._all, (parts, groups), strict=True)]
        self._progress = {int(name[5:10]): size for name, size in files.items() if name.endswith(".progress")}

    def missing(self, job: Job) -> int:
        """Return how many partitions and groups a job has to build."""
        kinds = {"build": self._missing[:1], "merge": self._missing[1:], "all": self._missing}[self._step]
        return sum(number % job.shares == job.share for kind in kinds for number in kind)

    def state(self, job: Job) -> object:
        """Return a value that changes while the workers of a job are at work."""
        progress = sorted(item for item in self._progress.items() if item[0] % job.shares == job.share)
        return self.missing(job), progress


class _Share:
    """The job of one share, which may need several attempts."""

    def __init__(self, job: Job, folder: _Folder, how: How):
        self.job, self._folder, self._how = job, folder, how
        self._tries, self._left = 0, folder.missing(job) + 1
        self.process: BeamProcess | None = None

    def start(self, shares: "list[_Share]") -> None:
        """Start the next attempt, with a token of its own: workers of the last one stop before they write. Raises PlaceError."""
        left = self._folder.missing(self.job)
        self._tries = 1 if left < self._left else self._tries + 1
        self._left, self._state, self._moved = left, self._folder.state(self.job), time.monotonic()
        self.job = self.job._replace(token=secrets.token_hex(8))
        places.write_text(self._folder.path / TOKEN, "\n".join(share.job.token for share in shares))
        addresses, share = pools(self._how.flags), self.job.share
        more = (f"--environment_config={addresses[share % len(addresses)]}",) if addresses else ()
        self.process = BeamProcess(self.job, (*self._how.flags, *more), self._how.submitted)

    def ended(self) -> bool:
        """Take the result of the process, which has ended. Return whether to start it again. Raises PlaceError, RunnerFailed."""
        assert self.process is not None
        error, self.process = self.process.result(), None
        if error is None:
            return False
        _raise_failed(error)
        if "\n" in error and not self._how.submitted:
            raise RunnerFailed(error)
        self._lost(_reason(error, flag_value(self._how.flags, "--job_endpoint")))
        return True

    def stalled(self, stall: float) -> bool:
        """Stop the process if nothing has changed for `stall` seconds. Return whether to start it again. Raises PlaceError."""
        assert self.process is not None
        if (state := self._folder.state(self.job)) != self._state:
            self._state, self._moved = state, time.monotonic()
        if time.monotonic() - self._moved <= stall:
            return False
        process, self.process = self.process, None
        process.stop()
        self._lost(f"no row was finished for {stall / 60:.3g} minutes, so its worker seems lost")
        return True

    def _lost(self, what: str) -> None:
        """Say what happened. Raises PlaceError if it happened too often."""
        left = self._folder.missing(self.job)
        runner = runner_of(self._how.flags) if self._how.submitted else "on this machine"
        if left >= self._left and self._tries >= TRIES:
            fix = "check its services and workers" if self._how.submitted else "give fewer --workers if memory is short"
            raise PlaceError(
                f"Beam {runner}: {what}; {TRIES} attempts in a row finished no partition; {fix}, then run the same command again"
            )
        print(f"Beam {runner}: {what}; the job starts again with what is missing", file=sys.stderr)


def _reason(error: str, endpoint: str | None) -> str:
    """Return the line of an error that tells most: the details of a failed call of gRPC, or the last one with words."""
    if "grpc.FutureTimeoutError" in error:
        return f"--job_endpoint {endpoint} does not answer"
    if details := re.findall(r'^\s*details = "(.*)"$', error, re.MULTILINE):
        return f"a service does not answer ({details[-1][:300]})"
    lines = [line.strip() for line in error.splitlines() if re.search(r"[A-Za-z]{3}", line)]
    return lines[-1][:300] if lines else "failed without a message"


def _raise_failed(text: str) -> None:
    """Raise PlaceError if the text, an error as Beam passes it between processes, is that of a failed disk or machine."""
    if found := FAILED.search(text):
        raise PlaceError(f"{found[1]}; fix this and run the same command again") from None
