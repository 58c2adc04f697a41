"""Runs the Beam pipeline of a build, and goes on by itself when worker processes die.

The graph has the same few steps for any number of rows: list the partitions, build each, merge the facts of each group. Without
`--runner` a build uses Beam's local runner. With several workers it runs in a child process: the local runner waits for ever when one of
its workers dies, and all of its processes can be ended and started again only from outside.
"""

import multiprocessing
import os
import secrets
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait

from etils import epath

from data_prep.build_flags import PlaceError
from data_prep.part_files import GROUP, TOKEN, finished
from data_prep.partition import FAILED, BuildPartition, Job, ListPartitions, MergeGroup
from ymplug_jax.core import places

FRUITLESS = 3  # attempts in a row that may end without a further partition


class RunnerFailed(RuntimeError):
    """The pipeline ended without a result, and not because of a disk or a decoder. The message holds the traceback, or is one line."""


def run(job: Job, partitions: int, beam_flags: list[str], workers: int) -> None:
    """Build and merge the partitions that are missing.

    Args:
      job: of the build; every attempt gets a token of its own.
      partitions: number of all partitions.
      beam_flags: flags of Beam; without `--runner` the local runner is used.
      workers: processes of the local runner.

    Raises:
      PlaceError: a disk or the machine failed, or workers die again and again.
      OSError: the work folder cannot be read or written.
    """
    work = epath.Path(job.work)
    chosen = any(flag.split("=")[0] == "--runner" for flag in beam_flags)
    once: Callable[[Job, list[str]], None]
    if chosen:
        once = run_here
    elif workers == 1:
        once, beam_flags = run_here, [*beam_flags, "--runner=BundleBasedDirectRunner"]
    else:  # FnApiRunner runs local processes. Prism, the default of newer versions of Beam, needs a download.
        local = ["--runner=FnApiRunner", f"--direct_num_workers={workers}", "--direct_running_mode=multi_processing"]
        once, beam_flags = _run_in_child, [*beam_flags, *local]
    if not any(flag.startswith("--default_sdk_harness_log_level") for flag in beam_flags):
        beam_flags = [*beam_flags, "--default_sdk_harness_log_level=WARNING"]
    failures = 0
    before = _count(work)
    while before != (partitions, -(-partitions // GROUP)):
        job = job._replace(token=secrets.token_hex(8))
        places.write_text(work / TOKEN, job.token)
        try:
            once(job, beam_flags)
        except RunnerFailed as error:
            if once is run_here and not chosen:
                raise
            now = _count(work)
            failures = 0 if now > before else failures + 1
            if failures == FRUITLESS:
                if "\n" in str(error):
                    raise
                raise PlaceError(
                    f"{error}, {FRUITLESS} times without a finished shard; check that there is enough memory, then run the same command again"
                ) from None
            print(
                f"a worker process ended; going on with the partitions that are missing ({now[0]:,} of {partitions:,} are built)",
                file=sys.stderr,
            )
        after = _count(work)
        if after == before and not failures:
            raise RunnerFailed(f"{job.work}: Beam ended without building the partitions")
        before = after


def _count(work: epath.Path) -> tuple[int, int]:
    """Return the numbers of (partitions, groups) that are complete."""
    parts, groups, _ = finished(work)
    return len(parts), len(groups)


def run_here(job: Job, beam_flags: list[str]) -> None:
    """Run the pipeline once, with the runner that the flags name.

    Raises:
      PlaceError: a disk, a bucket or the decoder failed.
      RunnerFailed: anything else; the message holds the traceback.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    try:
        with beam.Pipeline(options=PipelineOptions(beam_flags, save_main_session=False)) as pipeline:
            built = (
                pipeline
                | "begin" >> beam.Create([None])
                | "list partitions" >> beam.ParDo(ListPartitions(job))
                | "spread" >> beam.Reshuffle()
                | "build" >> beam.ParDo(BuildPartition(job))
            )
            _ = built | "group" >> beam.GroupByKey() | "merge" >> beam.ParDo(MergeGroup(job))
    except Exception as error:
        if found := FAILED.search(f"{type(error).__name__}: {error}"):
            raise PlaceError(f"{found[1]}; fix this and run the same command again") from None
        raise RunnerFailed(traceback.format_exc()) from error


def _run_in_child(job: Job, beam_flags: list[str]) -> None:
    """Run the pipeline once in a child process, whose process group ends with it and with this process.

    Raises:
      PlaceError, RunnerFailed: as `run_here`, or a process of the runner died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, job, beam_flags), name="beam")
    child.start()
    theirs.close()
    try:
        wait([ours, child.sentinel])
        answer = ours.recv() if ours.poll() else None
    except EOFError:
        answer = None
    finally:
        _end(child)
        ours.close()
    if answer is None:
        raise RunnerFailed("a process of the build ended")
    kind, message = answer
    if kind == "place":
        raise PlaceError(message)
    if kind == "failed":
        raise RunnerFailed(message)


def _end(child: multiprocessing.process.BaseProcess) -> None:
    """Kill the child with its process group."""
    assert child.pid is not None
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has not made its group yet, or all are gone
        child.kill()
    child.join()


def _child(answer: Connection, job: Job, beam_flags: list[str]) -> None:
    """Run the pipeline and send ("done" | "place" | "failed", message). Runs in the child process."""
    os.setsid()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os.killpg(0, signal.SIGKILL)

    def thread_failed(args: threading.ExceptHookArgs) -> None:
        """Beam's thread that waits for a worker process raises when the process dies; the pipeline itself would wait for ever."""
        if args.thread is not None and args.thread.name == "run_worker":
            answer.send(("failed", f"a worker process of the build ended ({args.exc_value})"))
            os.killpg(0, signal.SIGKILL)
        threading.__excepthook__(args)

    threading.Thread(target=end_with_parent, daemon=True).start()
    threading.excepthook = thread_failed
    try:
        run_here(job, beam_flags)
        answer.send(("done", ""))
    except PlaceError as error:
        answer.send(("place", str(error)))
    except RunnerFailed as error:
        answer.send(("failed", str(error)))
