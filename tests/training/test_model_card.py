"""MODEL_CARD.md: what it says of a run, what an evaluation and a resumed training change in it, and that it never stops a run."""

import hashlib
import logging
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
import tiny
from ymplug_jax import command_line, main
from ymplug_jax.convert.store import Store
from ymplug_jax.core import checkpoint_files, state
from ymplug_jax.training import model_card, run_folder, setup

DIGEST = "0123456789abcdef" * 4


def convert_decoder(out: Path, data: list[str]) -> None:
    """A conversion of the language model that the runs below have."""
    flags, settings = command_line.parse(["--config=configs/tiny/pretrain.py", *data, *runs.SMALL])
    run = setup.prepare(command_line.experiment_of(flags, settings), jax.devices()[:1])
    params = {path: np.asarray(value) for path, value in state.flatten(setup.fresh_params(run)[0]).items()}
    store = Store(out, {})
    for path, value in params.items():
        if path.startswith("llm/"):
            store.write(path.removeprefix("llm/"), None, value, value.shape)
            store.wrote(path)
    record = {"model": "gpt3", "converter": "0.1.0", "sources": {"mp_rank_00_model_states.pt": DIGEST}, "adapter": None}
    paths = sorted(path.removeprefix("llm/") for path in params if path.startswith("llm/"))
    store.finish(paths, record | {"sizes": {"GPT3": dict(run.experiment.model["llm"])}})


def section(folder: Path, title: str) -> str:
    text = (folder / model_card.NAME).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return found


@pytest.mark.slow
def test_a_run_has_a_card_from_its_start_to_its_evaluation(tmp_path: Path) -> None:
    data = runs.make_data(tmp_path)
    convert_decoder(tmp_path / "decoder", data)
    folder = tmp_path / "run"
    more = ["--config.train.eval_scores_every=2 steps", "--config.train.best=loss", "--config.train.eval_every=2 steps"]
    more += [f"--config.train.init_from=llm:={tmp_path / 'decoder'}", "--config.train.save_every=2 steps"]
    runs.run(folder, data, *more, "--config.train.duration=4 steps")

    run = runs.saved(folder)
    frozen = sum(value.size for path, value in run.items() if path.startswith("llm/"))
    model = section(folder, "Model")
    assert "| Task | `pretrain` |" in model and "| Model family | `mplug_video` |" in model
    assert f"| Frozen parameters | {frozen:,}, `float32` |" in model
    assert f"| All parameters | {sum(value.size for value in run.values()):,} |" in model
    assert "| `llm` | kind gpt3, vocab 64, width 32, depth 2" in model
    weights = section(folder, "Weights")
    assert f"| `llm` | frozen | float32 | {frozen:,} | `decoder` |" in weights and "random, seed 42" in weights
    assert "a conversion of model `gpt3` by ymplug_jax 0.1.0" in weights and f"SHA-256 `{DIGEST}`" in weights
    manifest = hashlib.sha256((tmp_path / "data" / "manifest.json").read_bytes()).hexdigest()
    assert f"`{manifest}`" in section(folder, "Data") and "| Kind | `pretrain` |" in section(folder, "Data")
    training = section(folder, "Training")
    assert "`4 steps`: 4 steps of 8 examples; 21 examples" in training and "jax " in training
    assert "| `config.train.best` | `'loss'` | `''` |" in training and "config.train.seed`" not in training
    assert "config.options." not in training
    assert "### During training" in section(folder, "Scores") and "Best step: " in section(folder, "Scores")
    assert "licences of the initial weights" in section(folder, "Limits")
    best = (folder / "best" / model_card.NAME).read_text(encoding="utf-8")
    assert re.match(r"# Model card of `run`, step \d", best) and DIGEST in best and "During training" in best

    # A resumed run keeps what the card says of the weights, and what a person wrote into it.
    with (folder / model_card.NAME).open("a", encoding="utf-8") as file:
        file.write("\n## Notes\n\nOurs.\n")
    runs.run(folder, data, *more, "--config.train.duration=6 steps")
    assert section(folder, "Weights").strip() == weights.strip() and section(folder, "Notes").strip() == "Ours."
    assert "`6 steps`: 6 steps" in section(folder, "Training")
    during = [line for line in section(folder, "Scores").splitlines() if line.endswith(" | 6 |")]
    assert len(during) >= 2

    before = (folder / model_card.NAME).read_text(encoding="utf-8")
    assert main.main(["main", f"--workdir={folder}", "--mode=eval", "--config.train.batch_size=8"]) == 0
    assert "### Split validation: step 6, 9 examples" in section(folder, "Scores")
    assert before.partition("## Scores")[0] == (folder / model_card.NAME).read_text().partition("## Scores")[0]
    assert section(folder, "Notes").strip() == "Ours." and not list(folder.glob(".MODEL*"))


def begun(folder: Path) -> setup.Run:
    """A run whose folder has settings."""
    run = tiny.prepare()
    (folder / "data").mkdir()
    run_folder.write(run.experiment, folder)
    return run


def test_a_card_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, folder = begun(tmp_path), checkpoint_files.folder_of(str(tmp_path))
    (tmp_path / model_card.NAME).mkdir()
    with caplog.at_level(logging.WARNING):
        model_card.begin(run, folder, {}, 0)
        model_card.add_scores(run, folder, 1, {"loss": 1.0}, best=False)
    assert len(caplog.records) == 2 and all("MODEL_CARD.md: cannot be written" in r.message for r in caplog.records)


def test_an_older_run_gets_a_card_on_resume(tmp_path: Path) -> None:
    run, folder = begun(tmp_path), checkpoint_files.folder_of(str(tmp_path))
    model_card.add_evaluation(run, folder / "data")
    assert not (tmp_path / "data" / model_card.NAME).exists(), "no run, no card"
    model_card.begin(run, folder, {}, 7)
    assert "first written at step 7" in section(tmp_path, "Weights")
    data = section(tmp_path, "Data")
    assert "| `manifest.json` | missing or damaged" in data and "None" not in data
    model_card.add_scores(run, folder, 8, {"loss": 1.25, "odd | name": 0.5}, best=False)
    model_card.add_scores(run, folder, 9, {"loss": 1.0}, best=False)
    rows = [line for line in section(tmp_path, "Scores").splitlines() if line.endswith(("| 8 |", "| 9 |"))]
    assert len(rows) == 2 and rows[0] == "| loss | 1.00 nats | 9 |" and rows[1] == r"| odd \| name | 0.500 | 8 |"
