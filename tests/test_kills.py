"""`benchmarks.kills` at a small size: killed runs end like the reference, and what differs is told."""

import json
import shutil
from pathlib import Path

import pytest
from etils import epath

from benchmarks import kills, kills_compare, kills_data, kills_phases
from benchmarks.kills_phases import Seen


def test_phases_are_told_by_the_folder(tmp_path: Path) -> None:
    """The folder of a run grows as a run writes it; each moment is named against the folder before the start."""
    run, steps, best = tmp_path / "run", tmp_path / "run" / "checkpoints" / "steps", tmp_path / "run" / "best"
    before = kills_phases.look(epath.Path(run))
    assert before == Seen(
        {kills_phases.SAVING: set(), kills_phases.BEST: set(), kills_phases.FROZEN: set()}, set(), ([], None), []
    )

    def now(since: Seen = before) -> str:
        return kills_phases.phase(since, kills_phases.look(epath.Path(run)))

    def log(step: int, name: str) -> None:
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, name: 1.0}) + "\n")

    assert now() == kills_phases.START
    (run / "checkpoints" / "frozen.orbax-checkpoint-tmp").mkdir(parents=True)
    assert now() == kills_phases.FROZEN
    (run / "checkpoints" / "frozen.orbax-checkpoint-tmp").rename(run / "checkpoints" / "frozen")
    log(1, "loss")
    assert now() == kills_phases.TRAIN
    log(2, "loss")
    assert now() == kills_phases.CHECK
    log(2, "eval/loss")
    assert now() == kills_phases.TRAIN
    (best / "checkpoints" / "steps" / "2.orbax-checkpoint-tmp").mkdir(parents=True)
    assert now() == kills_phases.BEST
    (best / "checkpoints" / "steps" / "2.orbax-checkpoint-tmp").rename(best / "checkpoints" / "steps" / "2")
    assert now() == kills_phases.BEST  # complete, but without its note
    (best / "best.json").write_text('{"step": 2}')
    assert now() == kills_phases.TRAIN
    (steps / "4.orbax-checkpoint-tmp").mkdir(parents=True)
    assert now() == kills_phases.FIRST
    (steps / "4").mkdir()
    assert now() == kills_phases.SAVING
    assert (
        now(kills_phases.look(epath.Path(run))) == kills_phases.START
    )  # what an earlier start left counts for nothing
    log(kills_phases.STEPS, "eval/loss")
    (steps / "4.orbax-checkpoint-tmp").rmdir()
    assert now() == kills_phases.END


@pytest.mark.slow
def test_killed_runs_end_like_the_reference(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    runs = epath.Path(tmp_path / "runs")
    place = kills.Place(tmp_path, runs, kills_data.make("pretrain", tmp_path / "made", runs / "data"), 1)
    killer = kills.Killer(place, 3, seed=0, aimed=1.0)
    want = killer.run(kills.REFERENCE)
    got = killer.run("killed")
    assert (
        1 <= killer.kills() <= 3 and killer.left() == 3 - killer.kills() and kills_compare.differences(want, got) == []
    )
    kinds = {kind for kind, _ in want}
    assert {
        "parameters",
        "optimizer state",
        "frozen parameters",
        "data position",
        "best step",
        "scores",
        "metrics",
        "files",
    } <= kinds
    steps = [line["step"] for (kind, _), line in want.items() if kind == "metrics"]
    assert sorted(steps) == list(range(1, kills_phases.STEPS + 1))

    # A difference is told: a lost line, another best step, parameters of another step.
    run = Path(runs / "killed" / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] != 5))
    (run / "best" / "best.json").write_text('{"score": "loss", "value": 0.0, "step": 2}')
    last = run / "checkpoints" / "steps" / str(kills_phases.STEPS)
    (last / "progress" / "metadata").write_text('{"step": 24, "examples_seen": 8}')
    shutil.rmtree(last / "trainable")
    shutil.copytree(run / "checkpoints" / "steps" / "20" / "trainable", last / "trainable")
    told = {line.partition(": ")[0] for line in kills_compare.differences(want, kills_compare.content(epath.Path(run)))}
    assert {"metrics", "best step", "data position", "parameters"} <= told and "optimizer state" not in told
