"""A Beam job in a child process, which the driver can end whatever Beam is waiting for."""

import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from multiprocessing.connection import Connection, wait
from types import FrameType

from data_prep.partition import Job

END = 30.0  # seconds that a job may take to cancel itself and to end


class RunnerFailed(RuntimeError):
    """The pipeline ended without a result. The message holds the traceback."""


class Stopped(BaseException):
    """The driver asked the child process to cancel its job and to end."""


def submit(job: Job, flags: tuple[str, ...]) -> None:
    """Run the graph of a job to its end with the runner that the flags name.

    Raises:
      RunnerFailed: the job failed; the message holds the traceback.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    from data_prep.pipeline import add_steps

    try:
        pipeline = beam.Pipeline(options=PipelineOptions(list(flags), save_main_session=False))
        add_steps(pipeline, job)
        result = pipeline.run()
        try:
            result.wait_until_finish()
        except Stopped:
            result.cancel()
            raise
    except Exception:
        raise RunnerFailed(traceback.format_exc()) from None


class BeamProcess:
    """A child process that runs one job. It ends when this process ends, also after SIGKILL.

    Args:
      job: of the build.
      flags: of Beam.
      submitted: a service runs the job; it is cancelled there if the child has to stop.
    """

    def __init__(self, job: Job, flags: tuple[str, ...], submitted: bool):
        context = multiprocessing.get_context("spawn")  # forking a process with threads could deadlock
        self.answer, theirs = context.Pipe(duplex=False)  # readable when the job, or the child, has ended
        self._process = context.Process(target=_serve, args=(job, flags, submitted, theirs), name=f"beam-{job.share}")
        self._process.start()
        theirs.close()  # so that the death of the child ends the pipe

    def result(self) -> str | None:
        """End the child once `answer` is readable, and return the error of the job: a traceback, or one line if the child died. None: done."""
        try:
            error: str | None = self.answer.recv()
            self._process.join(END)
        except (EOFError, OSError):
            self._process.join(END)
            error = f"a worker process {_cause(self._process.exitcode)}"
        self.stop()
        return error

    def stop(self) -> None:
        """End the child. A submitted job is cancelled first."""
        self.answer.close()
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(END)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"ended with exit code {code}"


def _serve(job: Job, flags: tuple[str, ...], submitted: bool, answer: Connection) -> None:
    """Run the job. Answer None, or its error. Runs in the child process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    logging.getLogger().addHandler(logging.NullHandler())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the driver decides
    if submitted:
        signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    try:
        submit(job, flags)
    except Stopped:
        return
    except RunnerFailed as error:
        answer.send(str(error))
    else:
        answer.send(None)


def _stop(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


def _end_with(parent: int) -> None:
    """End this process when its parent has ended."""
    wait([parent])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END)
    os._exit(1)
