"""Custom class names: read from a file, compared with those of the shards, and used by every task."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import shards
from ymplug_jax.core import config, exits
from ymplug_jax.core.config import Data, Experiment, Train
from ymplug_jax.data import schema
from ymplug_jax.data.records import Record
from ymplug_jax.models.abstractor import Abstractor
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.models.bert import Fusion, Text
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.tasks.common import preprocess
from ymplug_jax.training import run_folder

VISION = TimeSformer(image_size=16, patch_size=8, depth=1, width=16, heads=2, frames=2)
MODELS = {
    "classify": MPLUGVideo(
        vision=VISION,
        abstractor=Abstractor(queries=4, heads=2),
        llm=GPT3(vocab=300, width=32, depth=2, heads=2, max_positions=96),
        classes=3,
    ),
    "alpro_classify": ALPRO(
        vision=VISION.clone(clip=False),
        text=Text(vocab=64, width=32, depth=1, heads=2, hidden=48, max_positions=24),
        fusion=Fusion(depth=1, heads=2, hidden=48),
        contrastive_width=0,
        matching=False,
        masked=False,
        classes=3,
    ),
}
NAMES = ("圆形", "方形", "三角形")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder with shards whose manifest names three classes, a file with the names, and two tokenizers."""
    shards.write(tmp_path / "data", (4,))
    manifest(tmp_path, NAMES)
    (tmp_path / "names.txt").write_bytes("\ufeff圆形\r\n方形\n三角形".encode())
    shards.tokenizer(tmp_path / "t.model")
    shards.vocabulary(tmp_path / "vocab.txt")
    return tmp_path


def manifest(folder: Path, names: tuple[str, ...] | None) -> None:
    classes = {} if names is None else {"classes": list(names)}
    text = json.dumps({"schema_version": schema.SCHEMA_VERSION, "kind": "classification", "splits": {}} | classes)
    (folder / "data" / schema.MANIFEST).write_text(text, encoding="utf-8")


def experiment(name: str, folder: Path, model=None, **changes) -> Experiment:
    tokenizer = folder / ("t.model" if name == "classify" else "vocab.txt")
    data = Data(
        path=str(folder / "data"), tokenizer=str(tokenizer), classes=str(folder / "names.txt"), frames=2, image_size=16,
        max_tokens=24, augment=False,
    )  # fmt: skip
    return Experiment(
        task=name, model=model or MODELS[name], data=dataclasses.replace(data, **changes), train=Train(batch_size=4)
    )


def record(index: int, text: str) -> Record:
    return Record("a.mp4", [shards.jpeg(0)] * 4, np.arange(4), "红色的圆形在移动", [], text, index)


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    assert preprocess.class_names(Data()) == schema.CLASS_NAMES and len(schema.CLASS_NAMES) == 45
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeff猫 和 狗\r\n一\u2028二\n三\x0b四\n".encode())
    assert preprocess.class_names(Data(classes=str(file))) == ("猫 和 狗", "一\u2028二", "三\x0b四")
    with pytest.raises(exits.Mistake, match=r"config\.data\.classes nowhere.txt: no such file; give a file"):
        preprocess.class_names(Data(classes="nowhere.txt"))
    file.write_text("猫\n猫\n", encoding="utf-8")
    with pytest.raises(
        exits.Mistake, match=r"config\.options\.answers .*names.txt, line 2: answer '猫' repeats line 1"
    ):
        preprocess.names_in(str(file), "config.options.answers", "answer")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("\ufeff猫\r\n狗\u2028\x85x", ("猫", "狗\u2028\x85x")),
        ("\ufeff\ufeff猫 和 狗\n", ("猫 和 狗",)),
        ("", "no class names in it"),
        ("\ufeff\n", "line 1: an empty line"),
        ("猫\n\n狗\n", "line 2: an empty line"),
        ("猫\n狗\n\n", "line 3: an empty line"),
        ("猫\n \u3000\n", "line 2: an empty line"),
        ("猫\n狗 \n", "line 2: spaces around the class name '狗 '"),
        ("猫\r狗\r", "line 1: a carriage return inside the class name"),
        ("猫\n狗\r\n猫\n", "line 3: class name '猫' repeats line 1"),
    ],
)
def test_builder_training_and_run_folder_read_names_alike(
    content: str, names: tuple[str, ...] | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_bytes(content.encode())
    new = Experiment("classify", {}, Data(classes="names.txt"))
    if isinstance(names, tuple):
        assert schema.parse_class_names(content, "names.txt") == names == preprocess.class_names(new.data)
        run_folder.check(new, "new")
        Path("run").mkdir()
        Path("run/config.json").write_text(config.to_json(new))
        Path("run/classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        run_folder.check(new, "run")
        return
    for read in (
        lambda: schema.parse_class_names(content, "names.txt"),
        lambda: preprocess.class_names(new.data),
        lambda: run_folder.check(new, "new"),
    ):
        with pytest.raises(ValueError, match=f"names.txt.*{names}"):
            read()


@pytest.mark.parametrize("name", MODELS)
def test_tasks_use_the_names_of_the_run(name: str, folder: Path) -> None:
    task = task_lib.get(experiment(name, folder))
    records = [record(2, "三角形"), record(0, "圆形"), record(-1, ""), record(-1, "星形")]
    examples = [task.example(one, None) for one in records]
    assert [int(example["label"]) for example in examples] == [2, 0, -1, -1]
    votes = np.array([[0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 0, 0]], np.float32)
    rows = [
        {
            "index": i,
            "label": examples[i]["label"],
            "head": np.stack([votes[i]] * 3),
            "likelihood": np.stack([votes[i]] * 3),
        }
        for i in range(4)
    ]
    report = task.score(rows, records)
    assert (report.scores["labelled"], report.scores["unlisted"]) == (3, 1)
    assert report.scores["both/head_top1"] == pytest.approx(100 / 3)  # one correct, one wrong, one unlisted
    assert report.scores["both/head_top5"] == pytest.approx(200 / 3)
    assert [row["predicted"] for row in report.rows] == ["三角形", "方形", "圆形", "圆形"]
    assert [row["label"] for row in report.rows] == ["三角形", "圆形", None, "星形"]
    if name == "classify":
        assert examples[0]["branches"].shape[0] == 3


@pytest.mark.parametrize("name", MODELS)
def test_names_that_do_not_fit_model_or_shards_are_refused(name: str, folder: Path) -> None:
    wide = MODELS[name].clone(classes=45)
    with pytest.raises(
        exits.Mistake,
        match=r"config\.model\.classes: 45 classes, but there are 3 names in .*; set config\.model\.classes=3",
    ):
        task_lib.get(experiment(name, folder, wide))
    with pytest.raises(
        exits.Mistake, match=r"3 classes, class 0 is '圆形', but the run has the 45 .* set config\.data\.classes"
    ):
        task_lib.get(experiment(name, folder, wide, classes=""))
    manifest(folder, ("圆形", "三角形", "方形"))
    with pytest.raises(exits.Mistake, match=r"class 1 is '三角形', but .*names\.txt.* class 1 is '方形'"):
        task_lib.get(experiment(name, folder))
    manifest(folder, (*NAMES, "星形"))
    with pytest.raises(exits.Mistake, match=r"4 classes, class 3 is '星形', but .* 3, class 3 is 'nothing'"):
        task_lib.get(experiment(name, folder))
    manifest(folder, None)  # older manifests name no classes and mean the 45 categories
    with pytest.raises(exits.Mistake, match="45 classes, class 0 is '翻唱'"):
        task_lib.get(experiment(name, folder))
    task_lib.get(experiment(name, folder, wide, classes=""))


@pytest.mark.parametrize("name", MODELS)
def test_a_label_of_other_shards_is_refused(name: str, folder: Path) -> None:
    (folder / "data" / schema.MANIFEST).unlink()
    task = task_lib.get(experiment(name, folder))
    for index, text, what in ((1, "圆形", "which is '方形'"), (36, "宠物", "none of the 3 classes")):
        with pytest.raises(exits.Mistake, match=f"a.mp4: its label '{text}' has number {index}, .*{what}"):
            task.example(record(index, text), None)


def test_a_name_longer_than_a_row_is_refused(folder: Path) -> None:
    (folder / "data" / schema.MANIFEST).unlink()
    (folder / "names.txt").write_text("圆形\n方形\n" + "红色的三角形在移动" * 30, encoding="utf-8")
    with pytest.raises(
        exits.Mistake, match=r"config\.data\.max_tokens: 24 tokens, but the class '红色的三角形.* tokens"
    ):
        task_lib.get(experiment("classify", folder))


def test_answers_and_classes_exclude_each_other(folder: Path) -> None:
    settings = experiment("alpro_classify", folder)
    options = dict(answers=str(folder / "names.txt"))
    with pytest.raises(exits.Mistake, match=r"config\.options\.answers, config\.data\.classes: both are set"):
        task_lib.get(dataclasses.replace(settings, options=options))
