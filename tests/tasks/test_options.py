"""Task options: reading, checking, completing, and run folders of older versions."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ymplug_jax import command_line
from ymplug_jax.core import config, exits
from ymplug_jax.core.config import Experiment
from ymplug_jax.tasks import names, options
from ymplug_jax.tasks.alpro import pretrain as alpro_pretrain
from ymplug_jax.tasks.mplug_video import caption, match
from ymplug_jax.training import run_folder

ROOT = Path(__file__).parent.parent.parent
# Options that an older version wrote for a run of task "match": those of all tasks.
OLD = {
    "prompt": "", "search": "beam", "beams": 5, "prompt_tokens": 20, "new_tokens": 100, "top_k": 5, "top_p": 0.0, "temperature": 1.0,
    "reference_negatives": True, "candidates": "", "best": 16, "group": 4, "masked_share": 0.15, "entities": "",
    "reference_entities": False, "prompts": "", "answers": "",
}  # fmt: skip


def read(*arguments: str) -> Experiment:
    return command_line.experiment_of(*command_line.parse(arguments))


def run_with(folder: Path, task: str, given: dict) -> Path:
    made = config.to_json(Experiment(task, {}, options=given))
    (folder / "config.json").write_text(made, encoding="utf-8")
    return folder


def test_a_config_has_only_the_options_of_its_task() -> None:
    made = read("--config", str(ROOT / "configs/tiny/caption.py"), "--config.options.search=greedy")
    assert made.options == dataclasses.asdict(caption.Options(prompt_tokens=4, new_tokens=24, search="greedy"))
    assert read("--config", str(ROOT / "configs/tiny/pretrain.py")).options == {}
    with pytest.raises(exits.Mistake, match=r"config\.options: unknown setting 'serach'; did you mean 'search'"):
        read("--config", str(ROOT / "configs/tiny/caption.py"), "--config.options.serach=greedy")
    with pytest.raises(exits.Mistake, match=r"config\.options: unknown setting 'search'"):
        read("--config", str(ROOT / "configs/tiny/match.py"), "--config.options.search=greedy")
    with pytest.raises(exits.Mistake, match=r"config\.options\.beams: 'many' is not a whole number"):
        read("--config", str(ROOT / "configs/tiny/caption.py"), "--config.options.beams=many")


def test_missing_options_are_completed_with_defaults(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from ymplug_jax.core import config\n"
        "def get_config():\n    return config.to_config_dict(config.Experiment('match', {}, options={'best': 3}))\n"
    )
    made = read("--config", str(file), "--config.options.group=4")
    assert made.options == dataclasses.asdict(match.Options(best=3, group=4))
    other = read("--config", str(file), "--config.task=alpro_pretrain", "--config.options.masked_share=0.5")
    assert other.options == dataclasses.asdict(alpro_pretrain.Options(masked_share=0.5))
    assert read("--config", str(file), "--config.task", "language").options == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"beams": 0}, "config.options.beams: 0 is too small; give 1 or more"),
        ({"temperature": 0.0}, "config.options.temperature: 0.0 is too small; give more than 0"),
        ({"top_p": 1.5}, "config.options.top_p: 1.5 is out of range; give at most 1"),
        ({"search": 3}, "config.options.search: 3 is not a string"),
        ({"best": 3}, "config.options: unknown setting 'best'"),
        (5, "config.options: 5 is not a group of settings"),
        (match.Options(), "config.options: options of another task"),
    ],
)
def test_invalid_options_are_refused(given: object, message: str) -> None:
    with pytest.raises(exits.Mistake, match=message):
        options.build(caption.Options, given)
    with pytest.raises(exits.Mistake, match=message):
        options.completed(Experiment("caption", {}, options=given))


def test_a_run_folder_of_an_older_version_is_read(tmp_path: Path) -> None:
    kept = run_folder.read_settings(run_with(tmp_path, "match", OLD))
    assert kept.options == {"reference_negatives": True, "candidates": "", "best": 16, "group": 4}
    assert read("--workdir", str(tmp_path), "--config.options.best=8").options["best"] == 8
    assert run_folder.read_settings(run_with(tmp_path, "language", OLD)).options == {}
    for given, message in (
        (OLD | {"grop": 2}, "config.options: unknown setting 'grop'; did you mean 'group'"),
        (OLD | {"best": "x"}, "config.options.best: 'x' is not a whole number"),
    ):
        with pytest.raises(exits.Mistake, match=f"config.json: damaged, or of another version: {message}"):
            run_folder.read_settings(run_with(tmp_path, "match", given))


def test_options_that_name_files() -> None:
    found = {
        (task, field.name): field.metadata["arrays"]
        for task, module in names.tasks().items()
        for field in dataclasses.fields(getattr(module, "Options", options.NoOptions))
        if field.metadata.get("file")
    }
    assert found == {
        ("match", "candidates"): ("video", "text"),
        ("alpro_pretrain", "entities"): ("entity_features",),
        ("alpro_prompter", "prompts"): (),
        ("alpro_prompter", "image_prompts"): (),
        ("alpro_classify", "answers"): (),
        ("mplug2_answer", "answers"): (),
    }
    made = Experiment("match", {}, options={"candidates": "i.npz"})
    assert options.files(made) == [("candidates", "i.npz", ("video", "text"))]
    assert options.files(Experiment("match", {})) == []


def test_predict_resets_options_that_only_training_uses() -> None:
    asked = options.for_predict(Experiment("alpro_pretrain", {}, options={"group": 3, "entities": "gone.npz"}))
    assert asked.options == dataclasses.asdict(alpro_pretrain.Options())
    asked = options.for_predict(Experiment("caption", {}, options={"search": "sample", "top_k": 3}))
    assert (asked.options["search"], asked.options["top_k"]) == ("sample", 3)


def test_the_core_imports_no_task() -> None:
    """Settings are read without importing any task."""
    code = "import sys, ymplug_jax.core.config; print([m for m in sys.modules if m.startswith('ymplug_jax.tasks')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == []
