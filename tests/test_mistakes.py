"""Common user errors: each prints one line and exits with code 2, before anything is compiled or a folder is created.

`--durations=0` shows the seconds of each check; `test_as_a_process` includes the start of a process.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import runs
import shards
from ymplug_jax import command_line, main
from ymplug_jax.core import config
from ymplug_jax.core.checkpoint import Checkpoints
from ymplug_jax.data import records, schema, source
from ymplug_jax.tasks import names
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.training import preflight, run_folder, setup

COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: COMPILED.append(event) if "backend_compile" in event else None
)
# The settings of runs.SMALL that every mPLUG-video task has.
SMALL = [flag for flag in runs.SMALL if not flag.startswith("--config.model.abstractor")]
ALPRO = [
    "--config.model.vision.image_size=16", "--config.model.vision.patch_size=8", "--config.model.vision.frames=2",
    "--config.data.frames=2", "--config.data.image_size=16", "--config.data.max_tokens=12", "--config.optim.warmup=1 steps",
    "--config.train.batch_size=8", "--config.options.group=4",
]  # fmt: skip
LANGUAGE = [flag for flag in SMALL if "llm" in flag or "data.max_tokens" in flag or "optim" in flag or "batch" in flag]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of every kind, two tokenizers and a run of the language model."""
    home = tmp_path_factory.mktemp("home")
    runs.make_data(home)
    shards.vocabulary(home / "vocab.txt")
    for kind in schema.COLUMNS:
        for split in ("train", "validation"):
            shards.write(home / kind, (9,), split=split, kind=kind)
    shards.write_talks(home / "instruct", [shards.talk("Human: 你好\nAI: 你好。")] * 9)
    (home / "titles.txt").write_text("红色的圆形\n" * 20, encoding="utf-8")
    data = [f"--config.data.path={home / 'titles.txt'}", f"--config.data.tokenizer={home / 't.model'}"]
    flags, settings = command_line.parse(["--config", str(runs.ROOT / "configs/tiny/language.py"), *data, *LANGUAGE])
    a_run(home / "language", command_line.experiment_of(flags, settings))
    return home


def a_run(folder: Path, experiment: config.Experiment) -> None:
    """Write the folder of a run with a checkpoint but without any training."""
    run = setup.prepare(experiment)
    run_folder.write(experiment, folder)
    checkpoints = Checkpoints(str(folder))
    state, frozen, seen, _ = setup.initialise(run, checkpoints)
    checkpoints.save_frozen(frozen)
    checkpoints.save(state, 1, seen)
    checkpoints.close()


@pytest.fixture(autouse=True)
def _logging_as_it_was():
    handlers, level = list(logging.root.handlers), logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


class Refused:
    """Calls main with flags that it must refuse, without changing anything on disk."""

    def __init__(self, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
        self.home, self.tmp_path, self.capsys = home, tmp_path, capsys

    def __call__(self, *flags: str, task: str = "", workdir: str = "run") -> str:
        """Return the one line of output without "error: ". A `task` adds its tiny config, valid settings and fitting shards."""
        flags = tuple(flag.format(home=self.home, tmp=self.tmp_path) for flag in flags)
        if task:
            flags = (*base(self.home, task), f"--workdir={self.tmp_path / workdir}", *flags)
        before, _ = tree(self.tmp_path), COMPILED.clear()
        code = main.main(["ymplug_jax.main", *flags])
        out, err = self.capsys.readouterr()
        assert code == 2, err
        assert out == "" and COMPILED == [] and tree(self.tmp_path) == before
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


@pytest.fixture
def refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Refused:
    return Refused(home, tmp_path, capsys)


KINDS = {
    "classify": "classification",
    "caption": "captioning",
    "retrieve": "retrieval",
    "alpro_classify": "classification",
    "mplug2_answer": "question",
    "mplug2_caption": "captioning",
    "mplug2_classify": "classification",
}


def base(home: Path, task: str) -> list[str]:
    """Return the flags of a valid training run."""
    bert = task.startswith(("alpro", "mplug2"))
    kind, tokenizer = KINDS.get(task, "pretrain"), "vocab.txt" if bert else "t.model"
    small = ALPRO if bert else LANGUAGE if task == "language" else runs.SMALL
    if task.startswith("mplug_chat"):
        small = []  # the tiny configs are small enough for checks that come before anything is compiled
    if task in ("alpro_classify", "alpro_prompter", "mplug2_answer", "mplug2_caption", "mplug2_classify"):
        small = [flag for flag in small if "group" not in flag]
    data = [f"--config.data.path={home / kind}", f"--config.data.tokenizer={home / tokenizer}"]
    return [
        f"--config={runs.ROOT}/configs/tiny/{task.removeprefix('mplug_')}.py",
        *data,
        *small,
        "--config.train.duration=2 steps",
    ]


SETTINGS = {
    "wrong path": (["--config.data.path={tmp}/nowhere"], "{tmp}/nowhere: no such folder; build it with"),
    "no path": (["--config.data.path="], "config.data.path: empty; give the folder"),
    "a file as path": (["--config.data.path={home}/t.model"], "{home}/t.model: no such folder"),
    "missing split": (["--config.data.train_split=test"], "{home}/pretrain: no split 'test' here, it has train, validation"),
    "missing evaluation split": (["--config.data.eval_split=test"], "{home}/pretrain: no split 'test' here"),
    "missing tokenizer": (["--config.data.tokenizer={tmp}/t.model"], "tokenizer {tmp}/t.model: no such file; set"),
    "no tokenizer": (["--config.data.tokenizer="], "config.data.tokenizer: empty; give"),
    "no tokenizer in it": (["--config.data.tokenizer={home}/titles.txt"], "tokenizer {home}/titles.txt: the token '红色的圆形' is in line 1 and"),
    "other tokenizer": (["--config.model.llm.vocab=16"], "{home}/t.model has 26 tokens, the model only 16; give the tokenizer"),
    "wrong init_from": (["--config.train.init_from={tmp}/no"], "config.train.init_from: {tmp}/no: no such folder; give"),
    "init_from without checkpoint": (
        ["--config.train.init_from=llm={home}/pretrain"],
        "config.train.init_from: {home}/pretrain: no checkpoint here; give the --workdir of a run",
    ),
    "init_from of another task": (
        ["--config.train.init_from={home}/language"],
        "{home}/language/checkpoints does not fit the model of this config; missing: ",
    ),
    "init_from of another size": (
        ["--config.train.init_from=llm={home}/language", "--config.model.llm.width=64"],
        "{home}/language/checkpoints does not fit the model of this config; other shape: ",
    ),
    "init_from of another name": (
        ["--config.train.init_from=lm={home}/language"],
        "config.train.init_from: unknown subtree 'lm'; choose one of abstractor, ",
    ),
    "wrong key": (["--config.train.batch_sise=3"], "config.train: unknown setting 'batch_sise'; did you mean 'batch_size'?"),
    "wrong group": (["--config.trian.batch_size=3"], "config: unknown setting 'trian'; did you mean 'train'?"),
    "wrong key of the model": (["--config.model.llm.sparsity=3"], "config.model.llm: unknown setting 'sparsity'; choose one of depth, "),
    "key below a value": (["--config.train.batch_size.x=3"], "config.train.batch_size: a single value, not a group of settings; remove .x from the name"),
    "text for a number": (["--config.train.batch_size=abc"], "config.train.batch_size: 'abc' is not a whole number"),
    "float for an int": (["--config.train.batch_size=8.5"], "config.train.batch_size: '8.5' is not a whole number"),
    "text for a float": (["--config.optim.lr=fast"], "config.optim.lr: 'fast' is not a number"),
    "text for a bool": (["--config.data.augment=maybe"], "config.data.augment: 'maybe' is not true or false"),
    "no list": (["--config.optim.no_decay=('a', b"], "config.optim.no_decay: \"('a', b\" is not a tuple; write one such as ('a', 'b')"),
    "no value": (["--config.data.path"], "config.data.path: no value given; write --config.data.path=VALUE"),
    "batch of nothing": (["--config.train.batch_size=0"], "config.train.batch_size: 0 is too small; give 1 or more"),
    "batch too large": (["--config.train.batch_size=7000"], "config.train.batch_size: 7000 is larger than the training split; give at most 9"),
    "batch and accumulate": (["--config.train.accumulate=3"], "config.train.batch_size: 8 is not a multiple of config.train.accumulate x mesh"),
    "mesh": (["--config.mesh.fsdp=3"], "config.mesh: data=-1 x fsdp=3 x tensor=1 is not the number of devices"),
    "frames": (["--config.data.frames=3"], "config.data gives 3 frames of 16 px, config.model.vision takes 2 of 16"),
    "too many tokens": (["--config.data.max_tokens=4000"], "4 queries + 4000 tokens (config.data.max_tokens or"),
    "duration": (["--config.train.duration=forever"], "config.train.duration: cannot read the duration 'forever'; write"),
    "no duration": (["--config.train.duration=0 steps"], "config.train.duration: '0 steps' is less than one step of this data"),
    "no interval": (["--config.train.save_every=0 steps"], "config.train.save_every: '0 steps' is not an interval; write"),
    "warm-up": (["--config.optim.warmup=10"], "config.optim.warmup: cannot read the duration '10'"),
    "no layer": (["--config.model.llm.depth=0"], "config.model.llm.depth: 0 is too small; give 1 or more"),
    "no head": (["--config.model.vision.heads=0"], "config.model.vision.heads: 0 is too small; give 1 or more"),
    "heads that do not fit": (["--config.model.llm.heads=5"], "config.model.llm.width: 32 is not divisible by 5 heads; choose"),
    "dtype of the model": (["--config.model.llm.dtype=fp16"], "config.model.llm.dtype: unknown dtype 'fp16'; choose one of float32, bfloat16"),
    "dropout": (["--config.model.llm.dropout=1.5"], "config.model.llm.dropout: 1.5 is out of range; give 0 or more"),
    "beta": (["--config.optim.b1=1"], "config.optim.b1: 1.0 is out of range; give less than 1"),
    "seed": (["--config.train.seed=4294967296"], "config.train.seed: 4294967296 is out of range; give at most 4294967295"),
    "mesh rule": (["--config.mesh.rules=(('embed', 'fdsp'),)"], "config.mesh.rules: unknown mesh axis 'fdsp'; choose one of data, fsdp"),
    "schedule": (["--config.optim.schedule=cosin"], "config.optim.schedule: unknown schedule 'cosin'; choose one of cosine"),
    "task": (["--config.task=dance"], "config.task: unknown task 'dance'; choose one of alpro_classify, "),
    "frozen pattern": (["--config.train.frozen=lm/.*"], "config.train.frozen: the pattern 'lm/.*' matches no parameter"),
    "frozen dtype": (["--config.train.frozen_dtype=int4"], "config.train.frozen_dtype: unknown dtype 'int4'; choose one of float32, "),
    "best": (
        ["--config.train.best=token_acuracy", "--config.train.eval_scores_every=1 steps"],
        "config.train.best: unknown score 'token_acuracy'; did you mean 'token_accuracy'?",
    ),
    "best of another task": (
        ["--config.train.best=cider", "--config.train.eval_scores_every=1 steps"],
        "config.train.best: unknown score 'cider'; choose one of caption_loss, loss, token_accuracy, exact_share",
    ),
    "option of another task": (["--config.options.beams=3"], "config.options: unknown setting 'beams'; choose one of (none)"),
    "classes": (["--config.data.classes={tmp}/names.txt"], "config.data.classes {tmp}/names.txt: no such file; give a file"),
    "unknown flag": (["--wrokdir=x"], "--wrokdir: unknown flag; did you mean --workdir?"),
    "unknown mode": (["--mode=trian"], "--mode: unknown mode 'trian'; did you mean train?"),
    "text as steps": (["--steps", "abc"], "--steps: 'abc' is not a whole number; give an integer"),
    "no seed": (["--seeds=0"], "--seeds 0: too small; give 1 or more"),
    "fewer than no examples": (["--mode=eval", "--examples=-1"], "--examples: -1 is negative; give 1 or more"),
    "a word too many": (["train"], "'train': unexpected argument; write settings as"),
    "one process of many": (["--processes=2"], "--coordinator, --processes, --process_id: only some of them are set; give all three or none"),
    "evaluation before training": (["--mode=eval"], "{tmp}/run: no checkpoint here; give the --workdir of a trained run, or"),
    "evaluation of no split": (
        ["--mode=eval", "--config.train.init_from=llm={home}/language", "--config.data.eval_split="],
        "config.data.eval_split: empty; name the split to score",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_and_flags(refused: Refused, name: str):
    flags, message = SETTINGS[name]
    assert refused(*flags, task="pretrain").startswith(message.format(home=refused.home, tmp=refused.tmp_path))


CONFIGS = {
    "missing": ("{root}/configs/tiny/pretrian.py", "no such file; did you mean '{root}/configs/tiny/pretrain.py'?"),
    "missing suffix": ("{root}/configs/tiny/pretrain", "no such file; did you mean '{root}/configs/tiny/pretrain.py'?"),
    "missing folder": ("{tmp}/no/pretrain.py", "no such file, and no folder {tmp}/no"),
    "a folder": ("{root}/configs/tiny", "a folder, not a file; give a file in it: alpro_classify.py, "),
    "unknown size": ("{root}/configs/mplug_video/pretrain.py:13b", "unknown size '13b'; choose one of 1.3b, 2.7b"),
    "unknown vision tower": ("{root}/configs/mplug_video/pretrain.py:1.3b,h14", "unknown vision tower 'h14'; choose one of b16, "),
    "unknown slice": ("{root}/configs/mplug_video/pretrain.py:1.3b@v9-16", "unknown slice 'v9-16'; choose one of v5e-16"),
    "unknown variant": ("{root}/configs/alpro/pretrain.py:youtube", "unknown variant 'youtube'; choose one of youku, salesforce"),
    "unknown kind of decoder": ("{root}/configs/tiny/pretrain.py:1.3b", "unknown language model '1.3b'; choose one of gpt3, bloom, qwen"),
    "size of a config without": ("{root}/configs/tiny/alpro_retrieve.py:1.3b", "its get_config takes no argument; remove :1.3b"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_config_files(refused: Refused, name: str):
    file, message = (text.format(root=runs.ROOT, tmp=refused.tmp_path, home=refused.home) for text in CONFIGS[name])
    line = refused("--config", file, f"--workdir={refused.tmp_path}/run")
    assert line.startswith(f"--config {file.partition(':')[0]}") and message in line


SOURCES = {
    "syntax": ("def get_config(:\n  pass\n", "line 1 of {file}: invalid syntax"),
    "an import that is not there": ("import nothing_like_it\n", "ModuleNotFoundError: No module named 'nothing_like_it' (line 1)"),
    "an exception": ("def get_config():\n    return {{}}['size']\n", "KeyError: 'size' (line 2)"),
    "no function": ("config = 3\n", "no function get_config; define one that returns to_config_dict(Experiment(...))"),
    "no settings": ("def get_config():\n    pass\n", "get_config returns NoneType, not settings; return to_config_dict("),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_own_config_files(refused: Refused, name: str):
    file = refused.tmp_path / "mine.py"
    source, message = (text.format(file=file) for text in SOURCES[name])
    file.write_text(source, encoding="utf-8")
    line = refused(f"--config={file}", "--mode=plan")
    assert line.startswith(f"--config {file}") and message in line


def test_a_text_for_a_group(refused: Refused):
    line = refused(f"--config={runs.ROOT}/configs/tiny/pretrain.py", "--config.train=fast", "--mode=plan")
    assert line == "config.train: 'fast' is not a group of settings; set each one by name"
    assert "--config.model is provided after --config.model." in refused("--config.model=fast", task="pretrain")


def test_no_config_and_no_run(refused: Refused):
    assert refused("--mode=plan").startswith(
        "--config: missing; give a config file, e.g. --config configs/tiny/pretrain.py, or"
    )
    line = refused(f"--workdir={refused.tmp_path}/run", "--mode=eval")
    assert line.startswith(
        f"--config: missing, and --workdir {refused.tmp_path}/run holds no run (no config.json); give"
    )
    assert refused("--config", f"{runs.ROOT}/configs/tiny/pretrain.py").startswith(
        "--workdir: missing; give the folder"
    )


# The kinds of shards that each task accepts. With another kind it would train on empty texts or without a target.
TITLE, CAPTION = {"pretrain", "classification", "question"}, {"captioning", "retrieval"}
TAKES = {
    "language": TITLE,
    "pretrain": TITLE,
    "caption": CAPTION,
    "classify": {"classification"},
    "retrieve": TITLE | CAPTION,
    "match": TITLE | CAPTION,
    "alpro_classify": {"classification"},
    "alpro_pretrain": TITLE,
    "alpro_prompter": TITLE,
    "alpro_retrieve": TITLE | CAPTION,
    "mplug2_answer": {"question"},
    "mplug2_caption": CAPTION,
    "mplug2_classify": {"classification"},
    "mplug2_pretrain": TITLE,
    "mplug2_retrieve": TITLE | CAPTION,
    "mplug_chat_instruct": {"instruct"},
    "mplug_chat_pretrain": TITLE,
}


@pytest.mark.parametrize(
    ("task", "kind"),
    [(task, kind) for task in TAKES for kind in sorted((TITLE | CAPTION | {"instruct"}) - TAKES[task])],
)
def test_shards_of_another_kind(refused: Refused, task: str, kind: str):
    line = refused(f"--config.data.path={refused.home / kind}", "--config.data.eval_split=", task=task)
    assert line.startswith(f"{refused.home / kind}: split 'train' has kind '{kind}', but config.task='{task}' needs '")
    assert all(f"'{good}'" in line for good in TAKES[task]) and "data_prep.build_shards --config" in line


def experiment(home: Path, task: str, *more: str) -> config.Experiment:
    flags, settings = command_line.parse([*base(home, task), *more])
    return command_line.experiment_of(flags, settings)


@pytest.mark.parametrize("task", TAKES)
def test_shards_that_fit(home: Path, task: str):
    assert set(task_lib.get(experiment(home, task)).kinds) - {"text"} == TAKES[task]


def test_every_task_says_what_it_takes():
    assert set(names.tasks()) == set(TAKES)


def test_a_text_file_is_for_the_language_model_alone(refused: Refused):
    texts = f"--config.data.path={refused.home}/titles.txt"
    preflight.check(experiment(refused.home, "language", texts), refused.tmp_path / "run", "train")
    line = refused(texts, task="pretrain")
    assert line.startswith(
        f"{refused.home}/titles.txt: split 'train' has kind 'text', but config.task='pretrain' needs"
    )


def test_questions_with_a_list_of_answers(home: Path, tmp_path: Path, refused: Refused):
    (tmp_path / "answers.txt").write_text("是\n否\n", encoding="utf-8")
    questions = f"--config.data.path={home / 'question'}"
    answers = f"--config.options.answers={tmp_path / 'answers.txt'}"
    preflight.check(experiment(home, "alpro_classify", questions, answers), tmp_path / "run", "train")
    missing = f"--config.options.answers={tmp_path}/answer.txt"
    line = refused(questions, missing, task="alpro_classify")
    assert line == (
        f"config.options.answers {tmp_path}/answer.txt: no such file; did you mean '{tmp_path}/answers.txt'?"
    )


def test_captions_of_another_language(refused: Refused):
    """Said before a training whose evaluations would score nothing."""
    line = refused("--config.options.language=en", task="caption")
    assert line.startswith("videos/0.mp4: the reference '") and line.endswith(
        "' has no Latin letter and no digit, so it is not English; if the captions are Chinese, set "
        'config.options.language="zh", otherwise remove it from the split'
    )
    line = refused("--config.options.language=de", task="caption")
    assert line == "config.options.language: unknown language 'de'; choose one of zh, en"


def test_splits_of_two_kinds_in_one_folder(home: Path, tmp_path: Path, refused: Refused):
    """Each split is built separately; the manifest's top-level kind is that of the split built last."""
    folder = shutil.copytree(home / "captioning", tmp_path / "data")
    splits = {"train": {"kind": "captioning"}, "validation": {"kind": "classification"}}
    facts = {"schema_version": schema.SCHEMA_VERSION, "kind": "captioning", "splits": splits}
    (folder / schema.MANIFEST).write_text(json.dumps(facts), encoding="utf-8")
    line = refused(f"--config.data.path={folder}", task="caption")
    assert line.startswith(f"{folder}: split 'validation' has kind 'classification', but config.task='caption' needs")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "manifest.json: missing or without a kind, so the content of the records is unknown; copy the manifest"),
        ('{"schema_version": "1.0.0"}', "manifest.json: missing or without a kind"),
        ('{"schema_version": "1.0.0", "kind": "pretr', "manifest.json: not a manifest of data_prep ("),
        ("", "manifest.json: not a manifest of data_prep ("),
        ("[1]", "manifest.json: not a manifest of data_prep ("),
        ("\udc80", "manifest.json: not a manifest of data_prep ("),
        ('{"schema_version": "2.0.0", "kind": "pretrain"}', "manifest.json: schema_version 2.0.0, but this version reads 1.1.0"),
    ],
)  # fmt: skip
def test_manifests(home: Path, tmp_path: Path, refused: Refused, manifest: str | None, message: str):
    folder = shutil.copytree(home / "pretrain", tmp_path / "data")
    (folder / schema.MANIFEST).unlink()
    if manifest is not None:
        (folder / schema.MANIFEST).write_bytes(manifest.encode("utf-8", "surrogateescape"))
    line = refused(f"--config.data.path={folder}", task="pretrain")
    assert line.startswith(f"{folder}/{message}")


def test_a_split_without_records(tmp_path: Path, refused: Refused):
    shards.write(tmp_path / "data", (9,))
    shards.write(tmp_path / "data", (0,), split="validation")
    line = refused(f"--config.data.path={tmp_path}/data", task="pretrain")
    assert line.startswith(f"{tmp_path}/data: split 'validation' has no records")


def test_an_evaluation_needs_its_own_split_alone(home: Path, tmp_path: Path):
    shards.write(tmp_path / "data", (3,), split="test")
    more = ["--config.data.eval_split=test", f"--config.train.init_from=llm={home}/language"]
    made = experiment(home, "pretrain", f"--config.data.path={tmp_path}/data", *more)
    preflight.check(made, tmp_path / "run", "eval")
    with pytest.raises(FileNotFoundError, match="no split 'train' here, it has test"):
        preflight.check(made, tmp_path / "run", "train")


def test_arrays_that_an_index_lacks(tmp_path: Path, refused: Refused):
    np.savez(tmp_path / "index.npz", video=np.zeros((2, 3)))
    line = refused(f"--config.options.entities={tmp_path}/index.npz", task="alpro_pretrain")
    assert line.startswith(f"config.options.entities {tmp_path}/index.npz: has no array 'entity_features'; give")


def test_files_that_options_name(tmp_path: Path, refused: Refused):
    line = refused("--config.options.candidates={tmp}/i.npz", task="match")
    assert line.startswith(f"config.options.candidates {tmp_path}/i.npz: no such file")
    line = refused("--config.options.candidates={home}/t.model", task="match")
    assert line.startswith(f"config.options.candidates {refused.home}/t.model: not an .npz file (")


def test_prompts_that_are_none(tmp_path: Path, refused: Refused):
    """Prompts are read only when scores are computed, so the check happens before the run."""
    (tmp_path / "prompts.json").write_text("[]", encoding="utf-8")
    line = refused(f"--config.options.prompts={tmp_path}/prompts.json", task="alpro_prompter")
    assert line.startswith(f"config.options.prompts {tmp_path}/prompts.json: not a file of entity prompts")


def test_the_folder_of_another_task(home: Path, tmp_path: Path, refused: Refused):
    shutil.copytree(home / "language", tmp_path / "run")
    for mode in ("train", "eval"):
        line = refused(f"--mode={mode}", task="pretrain")
        assert line.startswith(
            f"{tmp_path}/run: holds a run with config.task='language', not 'pretrain'; use its settings"
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "damaged, not JSON"),
        ('{"task": "pretrain", "model": {', "damaged, not JSON"),
        ("[]", "damaged"),
        (
            '{"task": "language", "model": {}, "train": {"batch_size": "8"}}',
            "config.train.batch_size: '8' is not a whole",
        ),
        ('{"task": "language", "model": {}, "trian": {}}', "config: unknown setting 'trian'"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_damaged_config_json(home: Path, tmp_path: Path, refused: Refused, content: str, message: str, mode: str):
    shutil.copytree(home / "language", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(content, encoding="utf-8")
    for with_config in (True, False):
        flags = base(home, "language") if with_config else []
        line = refused(*flags, f"--workdir={tmp_path}/run", f"--mode={mode}")
        assert line.startswith(f"{tmp_path}/run/config.json: damaged") and message in line


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file/run", "{tmp}/file is a file, not a folder"),
        ("file", "{tmp}/file is a file, not a folder"),
        ("a[b]", "'['"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_place_that_cannot_be_a_folder(tmp_path: Path, refused: Refused, place: str, message: str, mode: str):
    (tmp_path / "file").write_text("", encoding="utf-8")
    line = refused(f"--mode={mode}", task="pretrain", workdir=place)
    assert line.startswith(f"--workdir {'' if 'file' in place else chr(39)}{tmp_path}/{place}")
    assert message.format(tmp=tmp_path) in line


def test_no_permission(tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "closed").mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write everywhere, so simulate the answer that other users get
        asked, closed = os.access, tmp_path / "closed"
        monkeypatch.setattr(os, "access", lambda path, mode, **more: path != closed and asked(path, mode, **more))
    assert "no permission to write" in refused(task="pretrain", workdir="closed/run")


def test_each_of_several_seeds_is_checked(home: Path, tmp_path: Path, refused: Refused):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "seed_43").write_text("", encoding="utf-8")
    line = refused("--seeds=2", task="pretrain")
    assert line.startswith(f"--workdir {tmp_path}/run/seed_43: {tmp_path}/run/seed_43 is a file")


PROCESSES = {
    "unknown flag": (["--confg=x"], "--confg: unknown flag; did you mean --config?"),
    "wrong path": (["--config={root}/configs/tiny/pretrain.py", "--config.data.path=nowhere", "--config.data.tokenizer={home}/t.model",
                    "--workdir=run"], "nowhere: no such folder; build it with"),
    "misspelt setting": (["--config={root}/configs/tiny/pretrain.py", "--config.train.batch_sise=3"], "config.train: unknown setting"),
    "other kind": (["--config={root}/configs/tiny/caption.py", "--config.data.path={home}/classification",
                    "--config.data.tokenizer={home}/t.model", "--workdir=run", "--config.train.batch_size=2",
                    "--config.optim.warmup=1 steps"],
                   "{home}/classification: split 'train' has kind 'classification', but config.task='caption' needs"),
    "no run": (["--workdir=run", "--mode=eval"], "--config: missing, and --workdir run holds no run"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROCESSES)
def test_as_a_process(home: Path, tmp_path: Path, name: str):
    """The exit code that launch scripts see, started outside the checkout."""
    flags, message = PROCESSES[name]
    command = [sys.executable, "-m", "ymplug_jax.main", *(flag.format(root=runs.ROOT, home=home) for flag in flags)]
    done = subprocess.run(
        command, cwd=tmp_path, env=runs.environment() | {"PYTHONPATH": str(runs.ROOT)}, text=True, capture_output=True, timeout=60
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and os.listdir(tmp_path) == []
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: " + message.format(home=home))


@pytest.mark.parametrize("there", ["one", "few"])
def test_an_evaluation_of_seeds_that_were_not_trained(home: Path, tmp_path: Path, refused: Refused, there: str):
    """Parameters of `init_from` must not be scored in place of a missing run."""
    folder = tmp_path / ("run" if there == "one" else "run/seed_42")
    shutil.copytree(home / "language", folder)
    line = refused("--mode=eval", "--seeds=2", f"--config.train.init_from={home}/language", task="language")
    if there == "one":
        assert line == f"--seeds 2: {folder} holds a single run, not one run per seed; evaluate it without --seeds"
    else:
        assert line.startswith(
            f"--seeds 2: no run in {tmp_path}/run/seed_43 (found: seed_42); train with the same --seeds first"
        )


def test_a_conversion_is_not_trained_in(tmp_path: Path, refused: Refused):
    (tmp_path / "run/checkpoints/converted").mkdir(parents=True)
    assert refused(task="language").startswith(f"--workdir {tmp_path}/run: holds a conversion, ")


def test_a_corrupt_record_in_the_middle_saves_first(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """One line, exit code 2, and a checkpoint of the last step before the record."""
    data = tmp_path / "titles.txt"
    data.write_text("红色的圆形\n" * 79 + "坏\n", encoding="utf-8")
    real = source.Texts.__getitem__

    def get(self: source.Texts, i: int) -> records.Record:
        if (found := real(self, i)).title == "坏":
            raise records.CorruptRecord(f"{self.path}: record {i}: checksum does not fit; restore the shard")
        return found

    monkeypatch.setattr(source.Texts, "__getitem__", get)
    flags = [
        *base(home, "language"), f"--workdir={tmp_path / 'run'}", f"--config.data.path={data}", "--config.train.duration=20 steps",
        "--config.train.batch_size=8", "--config.optim.warmup=1 steps", "--config.data.eval_split=",
    ]  # fmt: skip
    assert main.main(["ymplug_jax.main", *flags]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "record 79" in line, line
    (step,) = (folder.name for folder in (tmp_path / "run/checkpoints/steps").iterdir())
    assert line.startswith(
        f"error: {data}: record 79: checksum does not fit; restore the shard; saved step {step}, run the same"
    ), line
    assert int(step) > 0
