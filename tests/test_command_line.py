"""Sources of settings: a config file in any folder, an existing run, and overrides on the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from ymplug_jax import command_line, main
from ymplug_jax.core import config, config_file, durations
from ymplug_jax.core.config import Data, Experiment, Mesh, Optim, Train
from ymplug_jax.core.exits import Mistake, PlaceFailed

PRETRAIN = f"{runs.ROOT}/configs/tiny/pretrain.py"


def read(*argv: str) -> Experiment:
    return command_line.experiment_of(*command_line.parse(argv))


@pytest.mark.parametrize(
    ("written", "group", "name", "value"),
    [
        (["--config.train.batch_size=32"], "train", "batch_size", 32),
        (["--config.train.batch_size", "32"], "train", "batch_size", 32),
        (["-config.train.batch_size", "32"], "train", "batch_size", 32),
        (["--config.mesh.data", "-1"], "mesh", "data", -1),
        (["--config.optim.lr=1"], "optim", "lr", 1.0),
        (["--config.optim.lr=3e-4"], "optim", "lr", 3e-4),
        (["--config.data.eval_split="], "data", "eval_split", ""),
        (["--config.data.path=a=b c"], "data", "path", "a=b c"),
        (["--config.data.path", "a b"], "data", "path", "a b"),
        (["--noconfig.data.augment"], "data", "augment", False),
        (["--config.data.augment=false"], "data", "augment", False),
        (["--config.data.skip_corrupt"], "data", "skip_corrupt", True),
        (["--config.train.frozen=('llm/.*',)"], "train", "frozen", ("llm/.*",)),
        (["--config.train.frozen=llm/.*"], "train", "frozen", ("llm/.*",)),
        (["--config.train.frozen=()"], "train", "frozen", ()),
        (["--config.optim.no_decay=('a', 'b')"], "optim", "no_decay", ("a", "b")),
        (["--config.optim.lr_scales=(('a/.*', 1),)"], "optim", "lr_scales", (("a/.*", 1.0),)),
        (["--config.mesh.rules=(('embed', 'fsdp'),)"], "mesh", "rules", (("embed", "fsdp"),)),
        (["--config.train.batch_size=8", "--config.train.batch_size=32"], "train", "batch_size", 32),
    ],
)
def test_settings_as_they_are_written(written: list[str], group: str, name: str, value: object):
    """Overrides may stand before or after --config."""
    for argv in ([f"--config={PRETRAIN}", *written], [*written, "--config", PRETRAIN]):
        found = getattr(getattr(read(*argv), group), name)
        assert found == value and type(found) is type(value)


def test_settings_of_the_model():
    assert read("--config", PRETRAIN, "--config.model.llm.vocab=77").model["llm"]["vocab"] == 77


def test_the_kind_of_a_language_model():
    """The config file sets the kind together with its settings; the command line may repeat it but not change it."""
    model = read("--config", f"{PRETRAIN}:qwen", "--config.model.llm.kind=qwen", "--config.model.llm.kv_heads=4").model
    assert model["llm"]["kind"] == "qwen" and model["llm"]["kv_heads"] == 4
    with pytest.raises(Mistake) as caught:
        read("--config", PRETRAIN, "--config.model.llm.kind=qwen", "--config.model.llm.width=64")
    assert str(caught.value) == (
        "config.model.llm.kind: cannot change 'gpt3' to 'qwen', which has other settings; choose the model with --config, e.g. "
        "--config configs/mplug_video/pretrain.py:qwen2.5-1.5b"
    )
    with pytest.raises(Mistake) as caught:
        read("--config", PRETRAIN, "--config.model.llm.kind=llama")
    assert str(caught.value) == "config.model.llm.kind: unknown kind 'llama'; choose one of gpt3, bloom, qwen"
    with pytest.raises(
        Mistake, match=r"^config\.model.llm: unknown setting 'max_position'; did you mean 'max_positions'"
    ):
        read("--config", f"{PRETRAIN}:qwen", "--config.model.llm.max_position=3")
    with pytest.raises(
        Mistake, match=r"pretrain.py:llama: unknown language model 'llama'; choose one of gpt3, bloom, qwen$"
    ):
        read("--config", f"{PRETRAIN}:llama")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with settings and a copy of a tokenizer whose original no longer exists."""
    data = Data(path="shards", tokenizer=str(tmp_path / "gone" / "t.model"))
    made = Experiment("pretrain", {"llm": {"vocab": 9}}, data, Optim(lr=0.5), Mesh(), Train(frozen=("a",), seed=7))
    (tmp_path / "run" / "tokenizer").mkdir(parents=True)
    (tmp_path / "run" / "tokenizer" / "t.model").write_text("x", encoding="utf-8")
    (tmp_path / "run" / "config.json").write_text(config.to_json(made), encoding="utf-8")
    return tmp_path / "run"


def test_settings_of_a_run(run: Path):
    made = read("--workdir", str(run), "--mode=eval", "--config.data.eval_split=test")
    assert (made.task, made.optim.lr) == ("pretrain", 0.5)
    assert made.model == {"llm": {"kind": "gpt3", "vocab": 9}}, "runs from before the setting `kind` have GPT-3"
    assert made.train.frozen == ("a",) and made.data.path == "shards" and made.data.eval_split == "test"
    assert made.data.tokenizer == f"{run}/tokenizer/t.model"
    (run.parent / "gone").mkdir()
    (run.parent / "gone" / "t.model").write_text("x", encoding="utf-8")
    assert read("--workdir", str(run)).data.tokenizer == f"{run.parent}/gone/t.model"


def test_relative_paths_of_a_run_resolve_against_its_start_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "there" / "shards").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    settings = json.loads((run / "config.json").read_text())
    settings["data"]["path"], settings["task"], settings["options"]["candidates"] = "shards", "match", "index.npz"
    folder = shutil.copytree(run, tmp_path / "moved")
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "environment.json").write_text(json.dumps({"folder": str(tmp_path / "there")}))
    monkeypatch.chdir(tmp_path / "here")
    found = read("--workdir", str(folder))
    assert found.data.path == str(tmp_path / "there" / "shards") and found.options["candidates"] == "index.npz"
    (tmp_path / "here" / "shards").mkdir()
    assert read("--workdir", str(folder)).data.path == "shards"
    (tmp_path / "here" / "shards").rmdir()
    (folder / "environment.json").write_text("{")
    assert read("--workdir", str(folder)).data.path == "shards"


def test_settings_of_several_seeds(run: Path, tmp_path: Path):
    for seed in (10, 9):
        folder = shutil.copytree(run, tmp_path / "many" / f"seed_{seed}")
        kept = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept["train"]["seed"] = seed
        (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    assert read("--workdir", f"{tmp_path}/many", "--seeds=2").train.seed == 9


def test_a_config_file_comes_before_the_run(run: Path):
    assert read("--workdir", str(run), "--config", PRETRAIN).optim.lr == 1e-3


RECIPE = "NAME = {name!r}\n"
CONFIG = """
from ymplug_jax.core.config import Experiment, to_config_dict
from {module} import NAME

def get_config(arg="none"):
    import late
    return to_config_dict(Experiment(task=NAME, model={{"size": arg, "late": late.NAME}}))
"""


def own(folder: Path, module: str, name: str) -> Path:
    """Write a config that imports a recipe at import time and another module when get_config is called."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "late.py").write_text(RECIPE.format(name=f"late {name}"), encoding="utf-8")
    (folder / "mine.py").write_text(CONFIG.format(module=module), encoding="utf-8")
    return folder / "mine.py"


@pytest.mark.parametrize(
    ("folder", "module", "recipe"),
    [
        ("my runs.2", "recipe", "recipe.py"),
        ("my runs.2", ".recipe", "recipe.py"),
        ("my runs.2", "..shared.recipe", "../shared/recipe.py"),
        ("json", ".recipe", "recipe.py"),  # the folder has the name of a library
    ],
)
def test_imports_from_the_folder_of_a_config(tmp_path: Path, folder: str, module: str, recipe: str):
    file = own(tmp_path / folder, module, "one")
    (tmp_path / folder / recipe).parent.mkdir(exist_ok=True)
    (tmp_path / folder / recipe).write_text(RECIPE.format(name="dance"), encoding="utf-8")
    path, modules = list(sys.path), set(sys.modules)
    made = config_file.load(f"{file}:big")
    assert (made.task, made.model.size, made.model.late) == ("dance", "big", "late one")
    assert sys.path == path and set(sys.modules) == modules and json.loads("1") == 1


def test_each_config_imports_recipes_of_its_own_checkout(tmp_path: Path):
    """Two checkouts are loaded in turn while this checkout's `configs` is on the path."""
    for name in ("one", "two"):
        tree = tmp_path / name / "configs" / "family"
        tree.mkdir(parents=True)
        (tree / "recipe.py").write_text(RECIPE.format(name=name), encoding="utf-8")
        (tree / "mine.py").write_text(
            "from configs.family import recipe\nfrom . import recipe as near\nfrom ymplug_jax.core import config\n"
            "def get_config():\n    return config.to_config_dict(config.Experiment(recipe.NAME, {'near': near.NAME}))\n",
            encoding="utf-8",
        )
    from configs.mplug_video import recipe as ours

    for name in ("one", "two", "one"):
        made = config_file.load(str(tmp_path / name / "configs" / "family" / "mine.py"))
        assert (made.task, made.model.near) == (name, name)
    assert sys.modules["configs.mplug_video.recipe"] is ours


def test_a_config_of_the_checkout_from_another_folder(tmp_path: Path):
    """The working folder has a `configs` of its own, which must not be used."""
    (tmp_path / "configs" / "mplug_video").mkdir(parents=True)
    (tmp_path / "configs" / "mplug_video" / "recipe.py").write_text("raise RuntimeError('another tree')")
    command = [sys.executable, "-m", "ymplug_jax.main", "--mode=plan", f"--config={runs.ROOT}/configs/tiny/language.py"]
    # An installed package lies in a folder without configs.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "ymplug_jax").symlink_to(runs.ROOT / "ymplug_jax")
    settings = [
        "--config.data.examples=64",
        "--config.model.llm.width=32",
        "--config.model.llm.depth=1",
        "--config.model.llm.vocab=64",
    ]
    done = subprocess.run(
        [*command, *settings], cwd=tmp_path, env=runs.environment() | {"PYTHONPATH": f"{tmp_path}/site"},
        text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["frozen_params"] == 0


def raised(make) -> Exception:
    """Return the error that `make` raises, with its traceback."""
    with pytest.raises(Exception) as caught:
        make()
    return caught.value


def place(error: Exception) -> None:
    raise error


def test_exit_codes():
    """Errors raised by a `raise` statement of the package are user errors; those that Python raises there are bugs."""
    code = main._code
    assert code(Mistake("x"), False) == 2 and code(PlaceFailed("x"), True) == 5
    assert code(raised(lambda: durations.steps_in("x", steps_per_epoch=1)), False) == 2
    assert code(raised(lambda: place(ValueError("of a test"))), False) is None
    assert code(raised(lambda: config.checked((1,), tuple[()], "x")), False) is None  # an IndexError inside the package
    denied = PermissionError(13, "Permission denied", "/closed/run")
    assert code(denied, False) == 2 and code(denied, True) == 5
    assert main._line(denied).startswith("/closed/run: Permission denied; ")
    assert code(OSError(28, "No space left on device"), True) == 5
    assert code(OSError("a bug"), True) is None
    assert main._line(Mistake("two\nlines")) == "two lines"


def test_errors_raised_in_subfolders_are_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "tasks" / "family" / "task.py"
    file.parent.mkdir(parents=True)
    file.write_text("def make():\n    raise ValueError('config.model is wrong')\ndef bug():\n    return int('x')\n")
    space: dict = {}
    exec(compile(file.read_text(), str(file), "exec"), space)
    assert main._code(raised(space["make"]), False) is None
    monkeypatch.setattr(main, "HERE", tmp_path)
    assert main._code(raised(space["make"]), False) == 2
    assert main._code(raised(space["bug"]), False) is None


def test_help_names_every_flag(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main.main(["x", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("config", "workdir", "mode", "steps", "seeds", "coordinator"))
    assert os.environ.get("ALLOW_MULTIPLE_LIBTPU_LOAD") is None
