"""Jobs of a build under the watchdog: an external pool whose worker is killed, jobs that hang or die, and the flags of Beam."""

import itertools
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etils import epath

import buckets
import builds
from data_prep import beam_flags, beam_process, build_flags, build_shards, part_files, partition, runners
from data_prep.builder import Settings
from data_prep.partition import Job
from ymplug_jax.core import places

OURS = re.findall(r"--\w+", build_flags.parser().format_help())
ROWS = 400


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[str], list[subprocess.Popen]]]:
    """Beam's job service and two pools of workers: flags of Beam that lead there, and the processes of the pools."""
    jobs, *pools = free_port(), free_port(), free_port()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # a pool runs the command `python`
    module = "apache_beam.runners"
    commands = [
        (f"{module}.portability.local_job_service_main", "-p", str(jobs)),
        *((f"{module}.worker.worker_pool_main", f"--service_port={port}") for port in pools),
    ]
    log = (tmp_path_factory.mktemp("services") / "log").open("w")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *command],
            env={**os.environ, "PATH": path, "PYTHONPATH": str(builds.ROOT)},
            stdout=log,
            stderr=log,
        )
        for command in commands
    ]
    try:
        end = time.monotonic() + 120
        for port, process in zip((jobs, *pools), started, strict=True):
            while socket.socket().connect_ex(("localhost", port)):
                assert process.poll() is None and time.monotonic() < end, Path(log.name).read_text()[-2000:]
                time.sleep(0.1)
        flags = [
            "--runner=PortableRunner",
            f"--job_endpoint=localhost:{jobs}",
            "--environment_type=EXTERNAL",
            f"--environment_config={','.join(f'localhost:{port}' for port in pools)}",
        ]
        yield flags, started[1:]
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
        log.close()


@pytest.mark.slow
def test_a_killed_worker_of_an_external_pool(services: tuple[list[str], list[subprocess.Popen]], tmp_path: Path):
    """Two workers, one in each pool; one is killed in the middle. The command goes on and gives the bytes of a local build."""
    flags, pools = services
    csv, root = builds.corpus(tmp_path, ROWS)
    assert build_shards.main(builds.flags(csv, root, tmp_path / "local", "--workers=1")) == 0
    out = tmp_path / "pool"
    process = builds.start(builds.flags(csv, root, out, "--stall_minutes=0.5", "--time_limit=10", *flags))
    work = out / build_shards.BUILDING / "train"

    def built() -> list[int]:
        """Return the number of finished partitions of each share."""
        numbers = [int(path.name[5:10]) for path in work.glob("part-*.json")]
        return [sum(number % 2 == share for number in numbers) for share in (0, 1)]

    builds.wait_for(process, lambda: min(built()), 1, 300)
    slower = int(built()[1] < built()[0])
    workers = [pid for pid, line in builds.descendants(pools[slower].pid).items() if "SdkHarness(" in line]
    assert len(workers) == 1, "every address of the list has a worker"
    os.kill(workers[0], signal.SIGKILL)
    code, _, err = builds.end(process, 400)
    assert code == 0, err
    lost = "Beam PortableRunner: no row was finished for 0.5 minutes, so its worker seems lost; the job starts again"
    assert any(line.startswith(lost) for line in err.splitlines()), err
    assert builds.content(out) == builds.content(tmp_path / "local")


@pytest.mark.slow
def test_a_job_service_that_does_not_answer_is_one_line(tmp_path: Path):
    csv, root = builds.corpus(tmp_path, 4)
    address = f"--job_endpoint=localhost:{free_port()}"
    more = ["--runner=PortableRunner", address, "--job_server_timeout=1", "--environment_type=LOOPBACK"]
    code, _, err = builds.end(builds.start(builds.flags(csv, root, tmp_path / "out", *more)))
    *repeated, last = (line for line in err.splitlines() if not line.startswith("build: "))
    assert code == 5 and last.startswith(
        f"error: Beam PortableRunner: {address.replace('=', ' ')} does not answer; "
    ), err
    assert "3 attempts in a row finished no partition; check its services and workers, then run the same" in last
    assert [line.endswith("; the job starts again with what is missing") for line in repeated] == [True, True], err
    assert not (tmp_path / "out" / "manifest.json").exists()


class Play:
    """Stands for `BeamProcess`: `acts[share]` says what each attempt does."""

    def __init__(self, acts: dict[int, list[Callable[[Job], str | None]]]):
        self.acts, self.jobs, self.stopped = acts, list[Job](), 0

    def __call__(self, job: Job, flags: tuple[str, ...], submitted: bool) -> "Play.Process":
        self.jobs.append(job)
        return Play.Process(self, job)

    class Process:
        def __init__(self, play: "Play", job: Job):
            self.answer, self._theirs = multiprocessing.Pipe(duplex=False)
            self._play = play
            result = play.acts[job.share].pop(0)(job)
            if result != "hang":
                self._result = result
                self._theirs.send(None)

        def result(self) -> str | None:
            self.stop()
            return self._result

        def stop(self) -> None:
            self._play.stopped += 1
            self.answer.close()


def builds_some(work: Path, count: int, result: str | None) -> Callable[[Job], str | None]:
    """Act of an attempt that completes `count` of its partitions and, if these are all, its groups."""

    def act(job: Job) -> str | None:
        mine = [n for n in range(8) if n % job.shares == job.share and not (work / f"part-{n:05d}.json").exists()]
        for number in mine[:count] if job.step == "build" else []:
            (work / part_files.part_name(number, ".json")).write_text("{}")
        if job.step == "merge":
            (work / part_files.group_name(0, ".json")).write_text("{}")
        return result

    return act


def play(monkeypatch: pytest.MonkeyPatch, work: Path, stall: float, flags: list[str], acts: dict) -> Play:
    found = Play(acts)
    monkeypatch.setattr(runners, "BeamProcess", found)
    job = Job(str(work), "root", "train", 80, 10, Settings("pretrain", 4, 10.0), token="")
    runners.run(job, 8, flags, 2, stall)
    return found


POOL = ["--runner=PortableRunner", "--environment_type=EXTERNAL", "--environment_config=a:1,b:1"]


def test_a_lost_job_is_repeated_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    """One job hangs after one partition, dies after the next one, fails without progress twice and then ends; the other one is not touched."""
    some = lambda count, result: builds_some(tmp_path, count, result)  # noqa: E731
    acts = {
        0: [some(4, None), some(0, None)],
        1: [
            some(1, "hang"),
            some(1, "a worker process died"),
            some(0, "Trace\nlost"),
            some(0, "Trace\nlost"),
            some(2, None),
        ],
    }
    found = play(monkeypatch, tmp_path, 0.4, POOL, acts)
    assert [job.share for job in found.jobs] == [0, 1, 1, 1, 1, 1, 0] and found.stopped == 7
    assert [job.step for job in found.jobs] == ["build"] * 6 + ["merge"]
    assert len({job.token for job in found.jobs}) == 7, "workers of a lost attempt may not go on"
    reasons = [
        "no row was finished for 0.00667 minutes, so its worker seems lost",
        "a worker process died",
        "lost",
        "lost",
    ]
    assert capsys.readouterr().err.splitlines() == [
        f"Beam PortableRunner: {reason}; the job starts again with what is missing" for reason in reasons
    ]


@pytest.mark.parametrize(
    ("flags", "act", "message"),
    [
        (POOL, "hang", "Beam PortableRunner: no row was finished for 0.00333 minutes, .*; check its services and workers, "),
        ([], "a worker process was killed by signal 9 (Killed)", r"Beam on this machine: .* \(Killed\); 3 attempts .*give fewer --workers"),
    ],
)  # fmt: skip
def test_jobs_that_are_always_lost_end_the_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], act: str, message: str
):
    acts = {0: [builds_some(tmp_path, 4, None)], 1: [builds_some(tmp_path, 0, act)] * 3}
    with pytest.raises(build_flags.PlaceError, match=message):
        play(monkeypatch, tmp_path, 0.2, flags, acts)
    assert not acts[1], "three attempts, no more"


def test_an_error_of_the_program_is_not_repeated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    acts = {0: [builds_some(tmp_path, 4, None)], 1: [builds_some(tmp_path, 1, "Traceback\nKeyError: 'x'")]}
    with pytest.raises(beam_process.RunnerFailed, match="KeyError: 'x'"):
        play(monkeypatch, tmp_path, 5, [], acts)
    failed = "Traceback\ndata_prep.partition.PartitionFailed: /full: No space left on device [while running 'build']\n"
    acts = {0: [builds_some(tmp_path, 4, None)], 1: [builds_some(tmp_path, 1, failed)]}
    with pytest.raises(build_flags.PlaceError, match=r"^/full: No space left on device; fix this and run the same"):
        play(monkeypatch, tmp_path, 5, POOL, acts)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("Traceback\n  x\ngrpc.FutureTimeoutError\n", "--job_endpoint a:1 does not answer"),
        (
            'Traceback\ngrpc._channel._InactiveRpcError: <_InactiveRpcError of RPC that terminated with:\n'
            '\tstatus = StatusCode.UNAVAILABLE\n\tdetails = "failed to connect to all addresses"\n\tdebug_error_string = "x"\n>\n',
            "a service does not answer (failed to connect to all addresses)",
        ),
        ("Traceback\n  x\nRuntimeError: Error starting worker: no memory\n\n)\n", "RuntimeError: Error starting worker: no memory"),
        ("", "failed without a message"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failed_job(error: str, reason: str):
    assert runners._reason(error, "a:1") == reason


def test_a_job_that_ends_without_building_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    acts = {share: [builds_some(tmp_path, 3, None)] for share in (0, 1)}
    with pytest.raises(beam_process.RunnerFailed, match="Beam ended without building the partitions"):
        play(monkeypatch, tmp_path, 5, [], acts)


def test_progress_in_a_partition_counts(tmp_path: Path):
    """A worker that finishes rows of a long partition is not lost: the notes of its progress differ in size."""
    folder = runners._Folder(str(tmp_path), 4, "build")
    mine, other = (Job(str(tmp_path), "", "", 0, 0, Settings("pretrain", 4, 1.0), "", "build", i, 2) for i in (0, 1))
    before = folder.state(mine), folder.state(other)
    note = tmp_path / part_files.part_name(2, ".progress")
    states = []
    for beat, text in enumerate(("0 ", "0  ", "7   ")):
        note.write_text(text)
        folder.look()
        assert folder.state(other) == before[1], beat
        states.append(str(folder.state(mine)))
    assert len({*states, str(before[0])}) == 4
    assert epath.Path(folder.path) == epath.Path(tmp_path)


@pytest.mark.parametrize(
    ("flags", "workers", "jobs", "submitted"),
    [
        ([], 3, 3, False),
        ([], 9, 8, False),
        (["--runner=portablerunner", "--environment_type=external", "--environment_config", "a:1,b:1"], None, 2, True),
        (["--runner=PortableRunner", "--job_endpoint=a:1"], None, 1, True),
        (["--runner=PortableRunner", "--job_endpoint=a:1"], 3, 3, True),
        (["--runner", "DataflowRunner"], None, 1, True),
        (["--runner=apache_beam.runners.portability.flink_runner.FlinkRunner"], None, 1, True),
        (["--runner=DirectRunner"], None, 1, False),
    ],
)
def test_the_number_of_jobs(flags: list[str], workers: int | None, jobs: int, submitted: bool):
    how = runners.choose(flags, workers, 8)
    assert (how.jobs, how.submitted) == (jobs, submitted)
    assert (beam_flags.flag_value(how.flags, "--runner") == runners.LOCAL) == (not flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runner=DataflowRunner", "--num_wokers=3"], "--num_wokers: unknown flag; did you mean --num_workers?"),
        (["--runner=FlinkRunner", "--flink_mastr=a:1"], "--flink_mastr: unknown flag; did you mean --flink_master?"),
        (["--runner=DataflowRunner", "--time_limt=3"], "--time_limt: unknown flag; did you mean --time_limit?"),
        (["--runner=DataflowRunner", "--quick"], "--quick: unknown flag, which neither this program nor Beam has; "),
        (["--runner=FlinkRunner", "fast"], "fast: unknown flag, which "),
        (["--runner=FlinkRunner", "--flink_master=a:1", "--checkpointing_interval=60000"], None),
        (["--runner=DirectRunner", "--direct_num_workers=x"], "argument --direct_num_workers: invalid int value: 'x'; "),
        (["--runner=DataflowRunner", "--project=my-project", "--region=r"], "--runner DataflowRunner: needs --temp_location too; give gs://BUCKET/FOLDER"),
        (["--runner=FlinkRuner"], "--runner FlinkRuner: Unexpected pipeline runner: FlinkRuner."),
        (["--runner=SparkRunner", "--environment_type=EXTERNAL"], "--runner SparkRunner: Option external_service_address is required "),
    ],
)  # fmt: skip
def test_flags_of_beam(flags: list[str], message: str | None):
    if message is None:
        return beam_flags.check(flags, OURS, False)
    with pytest.raises(ValueError) as found:
        beam_flags.check(flags, OURS, False)
    assert str(found.value).startswith(message) and "\n" not in str(found.value)
    return None


def test_workers_and_a_cluster_do_not_go_together():
    with pytest.raises(ValueError, match="--workers: does not apply to --runner FlinkRunner; leave it out"):
        beam_flags.check(["--runner=FlinkRunner"], OURS, True)
    beam_flags.check(["--runner=PortableRunner", "--job_endpoint=a:1"], OURS, True)


def test_the_watchdog_waits_longer_than_a_clip_may_take(tmp_path: Path, capsys):
    csv, root = builds.corpus(tmp_path, 2)
    assert build_shards.main(builds.flags(csv, root, tmp_path / "out", "--stall_minutes=1", "--time_limit=60")) == 2
    assert capsys.readouterr().err == (
        "error: --stall_minutes 1: not above the 60 seconds of --time_limit; give more\n"
    )
    assert not (tmp_path / "out").exists()


def test_workers_note_their_progress_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """The notes tell the watchdog that a long partition goes on, and are gone at the end."""
    csv, root = builds.corpus(tmp_path, 20)
    write, sizes = places.write_text, []

    def watched(path: epath.Path, text: str) -> None:
        write(path, text)
        if str(path).endswith("part-00001.progress"):
            sizes.append(places.sizes(path.parent)[path.name])

    with buckets.served("clips") as server:
        monkeypatch.setattr(partition, "BEAT", 0.0)
        monkeypatch.setattr(partition.places, "write_text", watched)
        assert build_shards.main(builds.flags(csv, root, "gs://clips/out", "--workers=1")) == 0, capsys.readouterr().err
        names = server.names("clips", "out/")
    assert len(sizes) == 10 and all(a != b for a, b in itertools.pairwise(sizes)), sizes
    assert "out/manifest.json" in names and not [name for name in names if ".building" in name]
