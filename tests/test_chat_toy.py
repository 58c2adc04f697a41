"""The benchmark of the tiny chat model: its steps name real configs and files, and its figures are those of the evaluations."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import chat_toy
from data_prep import draw_shapes


@pytest.mark.parametrize("arm", chat_toy.ARMS)
def test_steps_fit_together(tmp_path: Path, arm: str):
    steps = [*chat_toy.data_steps(tmp_path, 160), *chat_toy.training_steps(tmp_path, 1, arm)]
    assert len({step.made for step in steps}) == len(steps)
    made = {str(tmp_path / "corpus"), str(tmp_path / "chat.model")}
    for program, *flags in (step.command for step in steps):
        named = dict(flag[2:].split("=", 1) for flag in flags)
        if "csv" in named:
            assert Path(named["csv"]).name in draw_shapes.CHAT_TABLES
        if program == "ymplug_jax.main":
            module, _, argument = named["config"].removeprefix("configs/").partition(".py:")
            config = importlib.import_module(f"configs.{module.replace('/', '.')}").get_config(argument)
            for name in named.keys() - {"config", "workdir", "mode"}:
                _, group, setting = name.split(".", 2)
                assert setting.split(".")[0] in config[group], name
            assert named["config.data.path"] in made or str(Path(named["config.data.path"]).parent) in made
            start = named.get("config.train.init_from", "").removeprefix("llm=")
            assert not start or start in made, "a run starts from one that is trained before it"
            made.add(named["workdir"])
        made |= {named["out"]} if "out" in named else set()
    assert any("chat_pretrain" in " ".join(step.command) for step in steps) == (arm != "no_titles")


def test_figures_come_from_the_evaluations(tmp_path: Path):
    def write(run: str, scores: dict) -> None:
        folder = tmp_path / f"{run}_lora" / "eval" / "validation"
        folder.mkdir(parents=True)
        (folder / "scores.json").write_text(json.dumps(scores), encoding="utf-8")

    views = {"exact": 0.95, "exact/majority": 0.25, "exact/black": 0.3, "exact/other": 0.2}
    write("chat", {**views, "questions": 560, "kinds": {"motion": views}})
    write("backwards", {"kinds": {"motion": {"exact": 0.91}, "order": {"exact": 0.8}}})
    write("scene", views)
    found = chat_toy.results(tmp_path, "lora")
    assert found["all"] == {"right": 95.0, "majority": 25.0, "black": 30.0, "other": 20.0} == found["kinds"]["motion"]
    assert found["backwards"] == {"motion": 91.0, "order": 80.0} and found["questions"] == 560


def test_finished_steps_are_not_repeated(tmp_path: Path, monkeypatch):
    codes, run = [0, 3], []
    monkeypatch.setattr(
        chat_toy.subprocess,
        "run",
        lambda command, **_: run.append(command) or type("Done", (), {"returncode": codes.pop(0)}),
    )
    step = chat_toy.Step(["module", "--flag"], tmp_path / "done" / "step")
    for _ in range(2):
        chat_toy.execute(step)
    assert [command[1:] for command in run] == [["-m", "module", "--flag"]]
    with pytest.raises(SystemExit) as ended:
        chat_toy.execute(chat_toy.Step(["module"], tmp_path / "other"))
    assert ended.value.code == 3 and not (tmp_path / "other").exists()
