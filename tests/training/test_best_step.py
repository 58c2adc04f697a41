"""The checkpoint with the best score is kept beside the newest ones, as a run folder of its own."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
from ymplug_jax.core import checkpoint, checkpoint_files, config, exits, metrics, state, stored_params
from ymplug_jax.training import best_step, evaluate


def training_state(value: float) -> state.TrainState:
    return state.TrainState(jnp.int32(0), {"head": {"kernel": jnp.full((2, 3), value)}}, {"m": jnp.zeros(2)})


def kept(workdir: Path) -> tuple[int | None, float]:
    """Return (step, value of the parameter) of the folder best/."""
    folder = str(workdir / "best")
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {"head": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32", sharding=place)}}
    return checkpoint_files.latest_step(folder), float(stored_params.load_params(folder, wanted)["head/kernel"][0, 0])


def test_a_better_step_replaces_the_one_before(tmp_path: Path) -> None:
    experiment = config.Experiment("caption", {}, train=config.Train(best="cider", eval_scores_every="1 steps"))
    keeper = best_step.Best(experiment, checkpoint_files.folder_of(str(tmp_path)), higher_is_better=True)
    offers = [(1, 0.5, True), (2, 0.4, False), (3, 0.5, False), (4, 0.75, True)]
    for step, value, better in offers:
        assert keeper.offer(training_state(step), step, 8 * step, {"cider": value, "clips": 3}, None) == better
    assert kept(tmp_path) == (4, 4.0)
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == {"score": "cider", "value": 0.75, "step": 4}
    # A resumed run continues from the stored best score.
    again = best_step.Best(experiment, checkpoint_files.folder_of(str(tmp_path)), higher_is_better=True)
    assert not again.offer(training_state(5), 5, 40, {"cider": 0.7}, None) and kept(tmp_path) == (4, 4.0)
    with pytest.raises(exits.Mistake, match=r"^config\.train\.best: .*'cider'; choose one of bleu4$"):
        again.offer(training_state(6), 6, 48, {"bleu4": 0.1, "clips": 3, "task": "caption"}, None)


@pytest.mark.parametrize("moment", ["save", "_describe", "keep_only"])
def test_a_kill_between_any_two_writes_loses_no_best_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Killed while step 6 replaces step 2, a run resumes from step 4 and offers step 5 first, which is not better than step 2."""
    experiment = config.Experiment("caption", {}, train=config.Train(best="cider", eval_scores_every="1 steps"))

    def keeper() -> best_step.Best:
        return best_step.Best(experiment, checkpoint_files.folder_of(str(tmp_path)), higher_is_better=True)

    assert keeper().offer(training_state(2), 2, 16, {"cider": 0.5}, None)
    home = best_step.Best if moment == "_describe" else checkpoint.Checkpoints
    real = getattr(home, moment)

    def killed(self: object, step: object, *more: object) -> None:
        if moment == "keep_only" and step == [2]:  # before the save
            return real(self, step, *more)
        if moment == "save":  # just after it
            real(self, step, *more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(home, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            keeper().offer(training_state(6), 6, 48, {"cider": 0.75}, None)
    assert set(checkpoint_files.steps_of(tmp_path / "best")) == {2, 6}
    again = keeper()
    assert not again.offer(training_state(5), 5, 40, {"cider": 0.4}, None)
    assert again.offer(training_state(6), 6, 48, {"cider": 0.75}, None)
    assert kept(tmp_path) == (6, 6.0) and checkpoint_files.steps_of(tmp_path / "best") == [6]
    assert json.loads((tmp_path / "best" / "best.json").read_text())["step"] == 6


def test_a_later_step_of_a_killed_run_without_its_note_is_replaced(tmp_path: Path) -> None:
    experiment = config.Experiment("caption", {}, train=config.Train(best="cider", eval_scores_every="1 steps"))
    folder = checkpoint_files.folder_of(str(tmp_path))
    assert best_step.Best(experiment, folder, higher_is_better=True).offer(
        training_state(6), 6, 48, {"cider": 0.7}, None
    )
    (tmp_path / "best" / "best.json").unlink()
    again = best_step.Best(experiment, folder, higher_is_better=True)
    assert again.offer(training_state(4), 4, 32, {"cider": 0.5}, None) and kept(tmp_path) == (4, 4.0)
    assert again.offer(training_state(6), 6, 48, {"cider": 0.7}, None) and kept(tmp_path) == (6, 6.0)


@pytest.mark.slow
def test_a_run_keeps_its_best_step(tmp_path: Path) -> None:
    data = runs.make_data(tmp_path)
    more = ["--config.train.eval_scores_every=4 steps", "--config.train.best=loss", "--config.train.duration=6 steps"]
    runs.run(tmp_path / "run", data, *more, "--config.train.eval_every=3 steps", "--config.train.keep=1")
    lines = [line for line in metrics.read_metrics(tmp_path / "run") if "eval/loss" in line]
    assert [line["step"] for line in lines] == [0, 3, 4, 6]
    assert [line["step"] for line in lines if "eval/exact_share" in line] == [0, 4, 6]  # the task's own scores
    scored = {line["step"]: line["eval/loss"] for line in lines if "eval/exact_share" in line}
    note = json.loads((tmp_path / "run" / "best" / "best.json").read_text())
    assert note["step"] == min(scored, key=scored.get) and note["value"] == pytest.approx(scored[note["step"]])
    assert checkpoint_files.latest_step(str(tmp_path / "run")) == 6

    folder = checkpoint_files.folder_of(str(tmp_path / "run" / "best"))
    assert not (tmp_path / "run" / "best" / "checkpoints" / "frozen").exists()  # shared with the run
    experiment = config.from_json((folder / "config.json").read_text())
    assert evaluate.evaluate(experiment, folder)["loss"] == pytest.approx(note["value"], abs=1e-5)
    newest, kept_one = runs.saved(tmp_path / "run"), runs.saved(tmp_path / "run" / "best")
    assert newest.keys() == kept_one.keys()
    same = note["step"] == 6
    assert np.array_equal(newest["abstractor/queries"], kept_one["abstractor/queries"]) == same
