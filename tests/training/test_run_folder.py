"""The run folder: settings that are refused before anything in it changes, and the files it keeps."""

import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import pytest
from etils import epath

from ymplug_jax.core import checkpoint, checkpoint_files, config
from ymplug_jax.core.config import Data, Experiment, Train
from ymplug_jax.core.exits import Mistake
from ymplug_jax.training import environment, run_folder

MODEL = {"llm": {"vocab": 64, "heads": 2, "remat": "none"}, "vision": {"width": 16}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two tokenizers and a run in "run"."""
    monkeypatch.chdir(tmp_path)
    Path("a.model").write_bytes(b"first")
    Path("b.model").write_bytes(b"other")
    Path("names.txt").write_text("cats\ndogs\n")
    run_folder.write(experiment(), "run")
    return tmp_path


def experiment(task: str = "pretrain", model: dict = MODEL, data: dict | None = None, **train) -> Experiment:
    return Experiment(task, model, Data(**{"tokenizer": "a.model", **(data or {})}), train=Train(**train))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(what: str, new: Experiment, workdir: str = "run") -> None:
    before = contents(Path())
    with pytest.raises(Mistake, match=what) as error:
        run_folder.check(new, workdir)
    assert "\n" not in str(error.value)
    assert contents(Path()) == before and not Path("new").exists()


def test_what_may_change_on_resume(folder: Path, caplog: pytest.LogCaptureFixture):
    Path("elsewhere").mkdir()
    Path("elsewhere/t.model").write_bytes(b"first")
    model = MODEL | {"llm": MODEL["llm"] | {"remat": "full"}}
    new = experiment(model=model, data={"tokenizer": "elsewhere/t.model", "path": "x"}, duration="20 epochs")
    run_folder.check(new, "run")
    run_folder.write(new, "run")
    assert "train.duration: '10 epochs' -> '20 epochs'" in caplog.text
    assert run_folder.read_settings("run").train.duration == "20 epochs"
    assert (folder / "run/tokenizer/t.model").read_bytes() == b"first"
    run_folder.check(new, "new/deep/run")
    assert not (folder / "new").exists()


def test_what_may_not_change_on_resume(folder: Path):
    refused("config.task='pretrain', not 'caption'", experiment("caption"))
    other = MODEL | {"llm": MODEL["llm"] | {"heads": 4}}
    refused(
        r"run: holds a run of another model \(config.model.llm.heads 2 -> 4\); .*--workdir", experiment(model=other)
    )
    refused(
        "tokenizer b.model: differs from the tokenizer of the run in .*set config.data.tokenizer=.*/run/tokenizer/a.model",
        experiment(data={"tokenizer": "b.model"}),
    )
    Path("a.model").write_bytes(b"changed under its name")
    refused("differs from the tokenizer of the run", experiment())
    refused("class names of the run", experiment(data={"tokenizer": "run/tokenizer/a.model", "classes": "names.txt"}))


def test_the_copies_of_a_run_never_change(folder: Path):
    Path("a.model").write_bytes(b"changed under its name")
    run_folder.write(experiment(), "run")
    assert (folder / "run/tokenizer/a.model").read_bytes() == b"first"


def test_changed_copies_are_refused(folder: Path):
    """Another tokenizer of the same name in the run's folder would change the meaning of every id."""
    kept = Path("run/tokenizer/a.model")
    kept.write_bytes(b"other")
    refused(
        "run/tokenizer/a.model: not the file that the run began with", new := experiment(data={"tokenizer": str(kept)})
    )
    run_folder.write(new, "run")  # the digest of the first start stays
    refused("not the file that the run began with", new)
    kept.write_bytes(b"first")
    run_folder.check(experiment(), "run")
    Path("run/environment.json").write_text("{}")  # of an earlier version
    kept.write_bytes(b"other")
    environment.check(epath.Path("run"))


def test_a_killed_start_leaves_nothing_to_the_next_one(folder: Path):
    """It wrote its copies but not config.json; the folder then begins with other files of the same names."""
    Path("elsewhere").mkdir()
    Path("elsewhere/a.model").write_bytes(b"other")
    run_folder.write(experiment(data={"classes": "names.txt"}), "killed")
    Path("killed/config.json").unlink()
    run_folder.check(new := experiment(data={"tokenizer": "elsewhere/a.model"}), "killed")
    run_folder.write(new, "killed")
    assert (folder / "killed/tokenizer/a.model").read_bytes() == b"other" and not Path("killed/classes.txt").exists()
    Path("killed/config.json").unlink()
    run_folder.write(experiment(data={"tokenizer": "killed/tokenizer/a.model"}), "killed")  # from its own copy
    assert (folder / "killed/tokenizer/a.model").read_bytes() == b"other"


def test_a_trained_run_without_its_settings(folder: Path):
    """Its copies are compared all the same."""
    run_folder.write(experiment(data={"classes": "names.txt"}), "trained")
    Path("trained/config.json").unlink()
    Path("trained/checkpoints/steps/1").mkdir(parents=True)
    Path("elsewhere").mkdir()
    Path("elsewhere/a.model").write_bytes(b"other")
    refused("differs from the tokenizer of the run", experiment(data={"tokenizer": "elsewhere/a.model"}), "trained")
    refused("differs from the class names of the run", experiment(), "trained")
    run_folder.check(experiment(data={"classes": "names.txt"}), "trained")


def test_class_names_are_compared_regardless_of_encoding(folder: Path):
    new = experiment(data={"classes": "names.txt"})
    run_folder.write(new, "named")
    assert (folder / "named/classes.txt").read_bytes() == b"cats\ndogs\n"
    Path("names.txt").write_bytes(b"\xef\xbb\xbfcats\r\ndogs")
    run_folder.check(new, "named")
    Path("names.txt").write_text("dogs\ncats\n")
    refused("class names of the run .*set config.data.classes=.*named/classes.txt", new, "named")
    refused("class names of the run", experiment(), "named")
    Path("names.txt").unlink()
    run_folder.check(new, "named")
    refused("config.data.classes names.txt: no such file", new, "new")


def test_lower_case_belongs_to_a_vocabulary(folder: Path):
    Path("vocab.txt").write_text("[UNK]\n")
    run_folder.write(experiment(data={"tokenizer": "vocab.txt"}), "bert")
    refused(
        "config.data.lower_case: is False, but .* has True",
        experiment(data={"tokenizer": "vocab.txt", "lower_case": False}),
        "bert",
    )


@pytest.mark.parametrize("name", ["run[1]", "a*", "b?", "c\\d", "new[/run", "\udcff"])
def test_folder_names_that_orbax_cannot_read(folder: Path, name: str):
    refused("--workdir .*(read back|UTF-8)", experiment(), name)


@pytest.mark.parametrize("name", ["run]", "a b", "lr=1e-3", "a,b", "a:b", "a#%{}", "圆形"])
def test_folder_names_that_work(folder: Path, name: str):
    run_folder.check(experiment(), name)
    value = {"w": jax.numpy.arange(4.0)}
    checkpoints = checkpoint.Checkpoints(name)
    checkpoints.save_frozen(value)  # written and read back
    assert checkpoint_files.places(name)


def test_folders_that_cannot_be_created(folder: Path):
    refused("a.model is a file, not a folder", experiment(), "a.model/new")
    refused("a.model is a file", experiment(), "a.model")
    os.symlink("nowhere", "link")
    refused("links to nowhere, which is missing", experiment(), "link")
    refused("cannot be created", experiment(), "x" * 300)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"", "not JSON .the file is empty"),
        (b'{"task": "pretr', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[]", "damaged"),
        (b'{"task": "pretrain", "model": {}, "data": 5}', "damaged"),
        (
            b'{"task": "pretrain", "model": {}, "data": {"frames": "four"}}',
            "config.data.frames: 'four' is not a whole number",
        ),
        (b'{"task": "pretrain", "model": {}, "data": {"frame": 4}}', "unknown setting 'frame'"),
        (b'{"task": 5, "model": {}}', "config.task: 5 is not a string"),
        (b'{"task": "pretrain", "model": 5}', "config.model is 5, not a group"),
        (b'{"model": {}}', "damaged"),
    ],
)
def test_a_damaged_config_is_one_line(folder: Path, text: bytes, what: str):
    (folder / "run/config.json").write_bytes(text)
    refused(f"^.*run/config.json: .*{what}.*; restore a copy, or delete the file", experiment())


def test_settings_of_older_versions_are_read(folder: Path):
    plain = json.loads((folder / "run/config.json").read_text())
    del plain["train"]["other_tokenizer"], plain["data"]["classes"]
    plain["train"]["log_every"] = 7
    (folder / "run/config.json").write_text(json.dumps(plain))
    model = {**MODEL, "llm": {"kind": "gpt3", **MODEL["llm"]}}  # the only decoder of older versions
    assert run_folder.read_settings("run") == experiment(model=model, log_every="7 steps")
    with pytest.raises(Mistake, match=r"nowhere: no config.json here"):
        run_folder.read_settings("nowhere")


def test_durations_between_log_lines():
    assert [Train(log_every=every).log_every for every in (50, "50", "5%", "1 epochs")] == [
        "50 steps", "50 steps", "5%", "1 epochs",
    ]  # fmt: skip
    locked = config.to_config_dict(experiment())
    locked.train.log_every = "1"
    assert config.from_config_dict(locked).train.log_every == "1 steps"


def test_init_from_another_tokenizer(folder: Path):
    def check(init_from: str, **more) -> None:
        run_folder.check_init_from(experiment(init_from=init_from, **more))

    with pytest.raises(Mistake, match="init_from: nowhere: no such folder"):
        check("nowhere")
    with pytest.raises(Mistake, match=r"init_from: 1e-3: no such folder \(and none named runs/lr=1e-3\)"):
        check("runs/lr=1e-3")
    with pytest.raises(Mistake, match="init_from: run: no checkpoint here"):
        check("run")
    checkpoint.Checkpoints("run").save_frozen({"w": jax.numpy.zeros(2)})
    check("run")
    Path("a.model").write_bytes(b"changed")
    with pytest.raises(Mistake, match=r"run was trained with another tokenizer than a.model; .*other_tokenizer=True"):
        check("run")
    with pytest.raises(Mistake, match="another tokenizer"):
        check("llm=run")
    check("run", other_tokenizer=True)
    check("vision=run")
    run_folder.check_init_from(dataclasses.replace(experiment(init_from="run"), data=Data()))


def test_a_conversion_is_not_trained_in(folder: Path):
    (folder / "given/checkpoints/converted").mkdir(parents=True)
    with pytest.raises(Mistake, match=r"^--workdir given: holds a conversion, .*--config\.train\.init_from=given$"):
        run_folder.check_no_conversion("given")
    run_folder.check(experiment(), "given")  # it can be evaluated
    run_folder.check_no_conversion("run")


def decoder(folder: str, **settings: object) -> None:
    """Write a run folder whose language model has these settings."""
    run_folder.write(experiment(model=llm(**settings)), folder)
    Path(folder, "checkpoints", "converted").mkdir(parents=True)
    Path(folder, "checkpoints", "converted", "_METADATA").write_text("{}")


def llm(**settings: object) -> dict:
    same = {"kind": "qwen", "vocab": 64, "width": 8, "depth": 2, "rope_theta": 1e6, "tied": True, "lora_rank": 0}
    return {"llm": same | settings}


@pytest.mark.parametrize(
    ("stored", "wanted", "message"),
    [
        (
            {"rope_theta": 1e4},
            {},
            "its language model has rope_theta=10000.0, but config.model.llm.rope_theta is 1000000.0",
        ),
        ({"tied": False}, {}, "its language model has tied=False, but config.model.llm.tied is True"),
        ({"lora_rank": 4}, {}, "its language model has lora_rank=4, but config.model.llm.lora_rank is 0"),
        ({"kind": "bloom"}, {}, "its language model has kind='bloom', but config.model.llm.kind is 'qwen'"),
        ({"lora_rank": 4, "lora_scale": 2.0}, {"lora_rank": 4, "lora_scale": 1.0}, "has lora_scale=2.0"),
        (
            {"lora_rank": 4, "lora_targets": ("mlp/up",)},
            {"lora_rank": 4, "lora_targets": ("attn/q",)},
            "has lora_targets=['mlp/up'], but config.model.llm.lora_targets is ['attn/q']",
        ),
    ],
)
def test_a_decoder_that_computes_something_else(folder: Path, stored: dict, wanted: dict, message: str):
    """All wanted parameters exist with the right shape, so only the settings reveal the difference."""
    decoder("before", **stored)
    with pytest.raises(Mistake, match=re.escape(message)):
        run_folder.check_init_from(experiment(model=llm(**wanted), init_from="llm=before"))


@pytest.mark.parametrize("stored", [{}, {"remat": "full"}, {"max_positions": 9}, {"vocab": 65, "rope_theta": 1e4}])
def test_a_decoder_that_computes_the_same(folder: Path, stored: dict):
    """A different vocabulary is left to the later comparison of shapes."""
    decoder("before", **stored)
    run_folder.check_init_from(experiment(model=llm(remat="none", max_positions=7), init_from="llm=before"))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_decoder_with_or_without_adapters(folder: Path, rank: int):
    """A folder without adapters accepts any settings of new ones. The tuple of targets is a list in config.json."""
    targets = {"lora_scale": 1.0, "lora_targets": ("attn/[qkv]",), "lora_dropout": 0.0}
    decoder("before", lora_rank=rank, **targets)
    new = targets if rank else {"lora_scale": 2.0, "lora_targets": ("mlp/up",)}
    for wanted in ({"lora_rank": rank, **targets}, {"lora_rank": 4, **new, "lora_dropout": 0.1}):
        run_folder.check_init_from(experiment(model=llm(**wanted), init_from="llm=before"))


def test_the_decoder_of_a_conversion(folder: Path):
    Path("converted", "checkpoints", "converted").mkdir(parents=True)
    Path("converted", "checkpoints", "converted", "_METADATA").write_text("{}")
    record = {"sizes": {"llm": llm(rope_theta=1e4)["llm"]}}
    Path("converted", "conversion.json").write_text(json.dumps(record))
    with pytest.raises(Mistake, match=r"has rope_theta=10000\.0"):
        run_folder.check_init_from(experiment(model=llm(), init_from="llm=converted"))
    Path("converted", "conversion.json").write_text('{"sizes": ')
    with pytest.raises(Mistake, match=r"conversion\.json: damaged; run the conversion again"):
        run_folder.check_init_from(experiment(model=llm(), init_from="llm=converted"))
