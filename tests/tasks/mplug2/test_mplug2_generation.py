"""Captioning and question answering with mPLUG-2 on small models: examples, losses, beam search, ranked answers, and whole runs."""

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import shards
import videos
from configs.mplug2 import answer as answer_config
from configs.mplug2 import caption as caption_config
from configs.mplug2 import recipe
from small_mplug2 import RELEASED, YOUKU
from task_rows import batch_of, rows_of
from ymplug_jax import predict
from ymplug_jax.core import checkpoint_files, config
from ymplug_jax.core.config import Data, Experiment, Optim, Train
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.records import Record, Records
from ymplug_jax.data.text import load_tokenizer
from ymplug_jax.inference import predict_flags
from ymplug_jax.models.language_model import Memory
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.tasks.common import preprocess
from ymplug_jax.tasks.common.passes import within
from ymplug_jax.tasks.mplug2 import answer, generation
from ymplug_jax.tasks.mplug2.answer_list import AnswerList
from ymplug_jax.tasks.task import Task
from ymplug_jax.training import evaluate, loop, preflight

PROMPT = "视频"
BOTH = pytest.mark.parametrize("model", [YOUKU, RELEASED], ids=lambda model: model.variant)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mplug2")
    for kind in ("captioning", "question"):
        shards.write(folder / kind, (12,), kind=kind)
        shards.write(folder / kind, (5,), split="validation", first=30, kind=kind)
    shards.vocabulary(folder / "vocab.txt")
    return folder


def experiment(folder: Path, model: MPLUG2, kind: str, *, tokens: int = 12, **options) -> Experiment:
    data = Data(
        path=str(folder / kind), tokenizer=str(folder / "vocab.txt"), frames=2, image_size=16, max_tokens=tokens,
        augment=False,
    )  # fmt: skip
    return Experiment(
        task="mplug2_caption" if kind == "captioning" else "mplug2_answer",
        model=model.clone(reads=kind != "captioning"),
        data=data,
        optim=Optim(lr=1e-2, warmup="0 steps"),
        train=Train(batch_size=8, duration="2 steps", log_every="1 steps", frozen_dtype="float32"),
        options=options,
    )


def prepared(made: Experiment, scale: float = 0.4) -> tuple[Task, dict]:
    """The task with random parameters: at initialisation all tokens are about equally likely."""
    task = task_lib.get(made)
    shapes, rng = jax.eval_shape(task.init, jax.random.key(0)), np.random.default_rng(3)
    return task, jax.tree.map(lambda leaf: rng.normal(0, scale, leaf.shape).astype(np.float32), shapes)


def record(title: str = "", captions: Sequence[str] = (), label: str = "") -> Record:
    return Record("a.mp4", [shards.jpeg(0)], np.zeros(1, np.int64), title, list(captions), label, -1)


# Captioning.


def test_prompt_is_no_target_and_long_captions_keep_their_end(folder: Path) -> None:
    task, params = prepared(experiment(folder, YOUKU, "captioning", prompt=PROMPT, tokens=9))
    known = load_tokenizer(str(folder / "vocab.txt"))
    prompt, words = known.encode(PROMPT), known.encode("红色的圆形在移动")
    made = task.one(record(captions=["红色的圆形在移动"]), None)
    assert made["ids"].tolist() == [known.bos, *prompt, *words[:5], known.eos] and made["mask"].all()
    batch = batch_of(task, Records(str(folder / "captioning"), "train"), np.random.default_rng(0), range(3))
    batch["labelled"][1] = batch["valid"][2] = False
    batch["mask"][0] = np.arange(9) < 6
    mean = jax.jit(lambda batch: task.loss(params, batch, None)[1]["loss"])
    assert mean(batch).weight == 3  # [CLS] and two tokens of the prompt are left out of six
    other = {key: value.copy() for key, value in batch.items()}
    other["ids"][1:] = other["ids"][0]
    other["ids"][0, 6:] = known.eos  # behind the end
    assert mean(other).value() == pytest.approx(mean(batch).value(), rel=1e-5)


def test_texts_are_readable(folder: Path, tmp_path: Path) -> None:
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "red",
        "sk",
        "##ate",
        "##board",
        "t",
        "-",
        "shirt",
        "红",
        "色",
        "，",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    known = load_tokenizer(str(tmp_path / "vocab.txt"))
    ids = known.encode("A red skateboard T-shirt")
    row = np.array([*ids, known.eos, known.encode("red")[0], known.pad], np.int32)
    assert generation.text_of(known, row) == "a red skateboard t-shirt"
    assert generation.text_of(known, np.array(known.encode("红色，red a"), np.int32)) == "红色，red a"
    assert generation.as_generated(known, "Réd T-shirt") == "red t-shirt"
    assert generation.as_generated(known, "blue") == "blue"  # not the empty text, although the vocabulary lacks it


def uncached(logs_of: Callable, begin: list[int], eos: int, beams: int, least: int, most: int) -> list[int]:
    """The best text of a beam search that reads the whole text in every step and goes on to the last one."""
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[tuple[float, list[int]]] = []
    for step in range(1, most + 1):
        rows = []
        for total, tokens in alive:
            logs = logs_of([*begin, *tokens])
            if step <= least:
                logs[eos] = -1e9
            rows += [(total + float(value), [*tokens, token]) for token, value in enumerate(logs)]
        rows = sorted(rows, key=lambda row: -row[0])[: 2 * beams]
        divisor = math.pow((5 + step) / 6, 0.6)
        finished += [(total / divisor, tokens) for total, tokens in rows[:beams] if tokens[-1] == eos]
        finished = sorted(finished, key=lambda row: -row[0])[:beams]
        alive = [row for row in rows if row[1][-1] != eos][:beams]
        if step == most:
            finished += [(total / divisor, tokens) for total, tokens in alive]
    return max(finished, key=lambda row: row[0])[1]


def check_search(
    task: Task, params: dict, model: MPLUG2, memory: Memory, batch: dict, begin: list[int], **search
) -> None:
    eos, width = 3, len(begin) + search["most"]

    @jax.jit
    def states_of(ids: jax.Array, memory: Memory) -> jax.Array:
        return within(model, params, lambda run: jax.nn.log_softmax(run.logits(run.decode(ids, None, memory))))

    predict = jax.jit(task.predict)
    found, lengths = jax.device_get(predict(params, batch)["generated"]), set()
    broken = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    assert not np.isfinite(predict(broken, batch)["value"]).any()  # so `predict` refuses such weights
    for row, said in enumerate(found):
        own = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], memory)

        def logs_of(text: list[int], own: Memory = own) -> np.ndarray:
            ids = np.zeros((1, width), np.int32)
            ids[0, : len(text)] = text
            return np.array(states_of(ids, own)[0, len(text) - 1])

        wanted = uncached(logs_of, begin, eos, **search)
        assert said[: len(wanted)].tolist() == wanted and set(said[len(wanted) :].tolist()) <= {eos}
        assert eos not in wanted[: search["least"]]
        lengths.add(len(wanted))
    assert min(lengths) < search["most"], "no text ends by itself"


@BOTH
def test_captions_equal_an_uncached_search(model: MPLUG2, folder: Path) -> None:
    made = experiment(folder, model, "captioning", prompt=PROMPT, beams=3, least_tokens=2, new_tokens=6)
    task, params = prepared(made)
    params["decoder"]["head"]["bias"][3] += 4.0  # so that some texts end before they are full
    batch = batch_of(task, Records(made.data.path, "train"), None, range(2))
    video = preprocess.normalize(batch["video"], "float32")
    memory = Memory(jax.jit(lambda: within(made.model, params, lambda run: run.encode_video(video)))())
    begin = [2, *load_tokenizer(made.data.tokenizer).encode(PROMPT)]
    check_search(task, params, made.model, memory, batch, begin, beams=3, least=2, most=6)


# Question answering.


@BOTH
def test_answers_equal_an_uncached_search(model: MPLUG2, folder: Path) -> None:
    made = experiment(folder, model, "question", beams=3, new_tokens=5)
    task, params = prepared(made)
    params["decoder"]["head"]["bias"][3] += 4.0
    batch = batch_of(task, Records(made.data.path, "train"), None, range(2))
    video = preprocess.normalize(batch["video"], "float32")
    ids, mask = jnp.asarray(batch["ids"]), jnp.asarray(batch["mask"])
    memory = jax.jit(lambda: within(model, params, lambda run: answer.read(run, video, ids, mask)))()
    check_search(task, params, model, memory, batch, [2], beams=3, least=1, most=5)


def test_control_tokens_in_a_question_are_text(folder: Path) -> None:
    task = task_lib.get(experiment(folder, YOUKU, "question"))
    ids = task.one(record("红[SEP]色[PAD]"), None)["ids"].tolist()
    assert ids[0] == 2 and ids.count(3) == 0
    assert task.one(record("红" * 40), None)["ids"].tolist()[1:] == [ids[1]] * 11


def test_a_conversion_with_another_number_of_words_is_refused(folder: Path, tmp_path: Path) -> None:
    made = experiment(folder, YOUKU, "question")
    for words in (64, len((folder / "vocab.txt").read_text().splitlines())):
        tree = {"text": {"token_embed": jnp.zeros((words, 16))}}
        place = tmp_path / str(words) / "checkpoints" / checkpoint_files.CONVERTED
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
            writer.save(epath.Path(place), args=ocp.args.PyTreeSave(tree))
        wrong = words == 64
        with pytest.raises(Mistake, match=r"but text/token_embed of .* has 64") if wrong else contextlib.nullcontext():
            preflight.check_words(made, str(tmp_path / str(words)))
    preflight.check_words(made, str(tmp_path / "64"), "vision/")


def test_texts_that_are_cut_are_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked, _ = prepared(experiment(folder, YOUKU, "question"))
    record = Record("x", [], np.zeros(0, np.int64), "红" * 11, [], "蓝" * 10, -1)
    assert asked.lengths(record) == (21, 21)
    assert asked.lengths(record._replace(title="红" * 14, label_text="蓝" * 13)) == (27, 21)
    told, _ = prepared(experiment(folder, YOUKU, "captioning", prompt=PROMPT))
    captions = record._replace(captions=["红" * 9, "红" * 20])
    assert told.lengths(captions) == (9, 8)
    split = [captions, record, record._replace(captions=["红" * 20])]
    preflight._say_cut(told, "train", split, False)
    assert "'train': texts of 2 of the first 3 records are cut, by up to 12 tokens" in caplog.text
    caplog.clear()
    preflight._say_cut(told, "train", split[1:2], False)
    assert not caplog.text


def test_loss_is_the_mean_over_questions(folder: Path) -> None:
    task, params = prepared(experiment(folder, YOUKU, "question"))
    batch = batch_of(task, Records(str(folder / "question"), "train"), None, range(3))
    batch["answer"][0, 2:], batch["answer_mask"][0, 2:] = 0, 0  # one target, the others have more
    batch["answer"][0, 1] = 3
    loss = jax.jit(lambda batch: task.loss(params, batch, None)[1])
    single = [loss(batch | {"valid": np.arange(3) == row})["loss"].value() for row in range(3)]
    found = loss(batch)
    assert found["loss"].weight == 3 and found["loss"].value() == pytest.approx(sum(single) / 3, rel=1e-5)
    assert found["token_accuracy"].weight == batch["answer_mask"][:, 1:].sum()
    batch["labelled"][1] = False
    assert loss(batch)["loss"].value() == pytest.approx((single[0] + single[2]) / 2, rel=1e-5)


def test_a_list_of_answers(folder: Path, tmp_path: Path) -> None:
    file, known = tmp_path / "answers.txt", load_tokenizer(str(folder / "vocab.txt"))
    file.write_text("红 色\n红色\n圆形\n3\n", encoding="utf-8")
    listed = AnswerList.read(str(file), known)
    assert listed.texts == ("红 色", "圆形", "3") and "红色" in listed and "方形" not in listed
    assert listed.ids[:, 0].tolist() == [2, 2, 2] and listed.mask.sum(axis=1).tolist() == [4, 4, 3]
    for text, what in (
        ("红色\n\n圆形\n", "line 2: an empty line"),
        ("红色\n红色\n", "line 2: answer '红色' repeats line 1"),
        ("宠物\n动物\n", ""),
        ("猫\n红\n狗\n", "line 3: '狗' has a word that the tokenizer does not know, and so the same tokens as line 1"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(Mistake, match=what) if what else contextlib.nullcontext():
            AnswerList.read(str(file), known)
    file.write_text("红色的圆形在移动" * 4 + "\n", encoding="utf-8")
    with pytest.raises(Mistake, match="has 34 tokens with start and end token"):
        task_lib.get(experiment(folder, YOUKU, "question", answers=str(file)))


def test_ranked_answers_and_their_scores(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "answers.txt").write_text("红色\n圆形\n蓝色的方形\n个\n", encoding="utf-8")
    task, params = prepared(experiment(folder, RELEASED, "question", answers=str(tmp_path / "answers.txt"), best=3))
    records = Records(str(folder / "question"), "validation")
    rows = rows_of(task, params, records)
    assert all(row["ranked"].shape == (3,) and row["probabilities"].sum() == pytest.approx(1) for row in rows)
    texts = ("红色", "圆形", "蓝色的方形", "个")
    first = texts[int(rows[0]["ranked"][0])]
    told = [record("一", label=first), record("二", label="宠物"), record("三"), *[record("四", label=first)] * 2]
    report = task.score(rows, told)
    assert report.scores["questions"] == 5 and report.scores["labelled"] == 4 and report.scores["unlisted"] == 1
    same = sum(int(row["ranked"][0]) == int(rows[0]["ranked"][0]) for row in (rows[0], *rows[3:]))
    assert report.scores["exact"] == same / 4 and "1 of the right answers are not in the list" in report.scores["note"]
    assert "exact" not in report.rows[2] and report.rows[1]["exact"] is False
    said = task.describe["answer"](rows[0], told[0], 2).json
    assert said["question"] == "一" and said["answer"] == next(iter(said["best"])) == first and len(said["best"]) == 2
    page = task.page.chance(report.scores, report.rows)
    assert page.scores["exact"] == 3 / 4 and [part.count for part in task.page.parts(report.rows)] == [
        4 - same,
        same,
        1,
    ]


# Settings, and runs.


@pytest.mark.parametrize(
    ("kind", "model", "options", "what"),
    [
        ("captioning", {"reads": True}, {}, "a captioning model has a decoder and reads no text"),
        ("captioning", {}, {"least_tokens": 8, "new_tokens": 8}, "config.options.least_tokens: 8 tokens"),
        ("captioning", {}, {"new_tokens": 24}, "config.options.new_tokens: 25 positions"),
        ("captioning", {}, {"new_tokens": 22, "prompt": "视频"}, "config.options.new_tokens: 25 positions"),
        ("captioning", {}, {"beams": 33}, "config.options.beams: 33 beams need 66 words"),
        ("captioning", {}, {"prompt": "视频" * 5}, "config.data.max_tokens: 12 leaves no room"),
        ("question", {"matching": True}, {}, "question answering has no heads"),
        ("question", {"generates": False}, {}, "question answering needs reads and generates"),
        ("question", {}, {"answer_tokens": 25}, "config.options.answer_tokens: 25 exceeds"),
        ("question", {}, {"answers": "/nowhere.txt"}, "config.options.answers /nowhere.txt: no such file"),
    ],
)
def test_mistakes_end_before_anything_is_compiled(
    folder: Path, kind: str, model: dict, options: dict, what: str
) -> None:
    made = experiment(folder, YOUKU, kind, **{"new_tokens": 6, **options})
    with pytest.raises(Mistake, match=what):
        task_lib.get(dataclasses.replace(made, model=made.model.clone(**model)))


@pytest.mark.parametrize(
    ("module", "arg", "count"),
    [
        (answer_config, "large", 1_031_533_370),
        (caption_config, "large", 621_853_498),
        (caption_config, "base-youku", 249_657_224),
    ],
)
def test_parameters_of_the_configs(module: ModuleType, arg: str, count: int) -> None:
    task = task_lib.get(config.from_config_dict(module.get_config(arg)))
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count and not task.frozen


def test_arguments_of_the_configs() -> None:
    named = [recipe.split_arg(arg) for arg in ("large", "base-msvd", "youku-l14")]
    assert named == [("large", "msrvtt"), ("base", "msvd"), ("youku-l14", "youku")]
    for arg in ("huge", "large-vatex", "youku-b16-msvd"):
        with pytest.raises(ValueError, match="unknown argument"):
            recipe.split_arg(arg)


def said_by(*flags: str | Path) -> list[dict]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert predict.main([*map(str, flags), "--decoders", "1", "--json"]) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captioning", "question"])
def test_a_run_trains_evaluates_and_predicts(
    kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made, home = experiment(folder, YOUKU, kind, new_tokens=6, beams=2), tmp_path / "run"
    loop.train(dataclasses.replace(made, data=dataclasses.replace(made.data, eval_split="")), epath.Path(home))
    clips = [videos.write(tmp_path / name) for name in ("a.mp4", "b.mp4")]
    if kind == "captioning":
        said = said_by("caption", "--checkpoint", home, "--video", *clips)
        assert [one.keys() for one in said] == [{"video", "caption"}] * 2 and " " not in said[0]["caption"]
        return
    found = evaluate.evaluate(made, epath.Path(home))
    assert found["examples"] == 5 and math.isfinite(found["loss"]) and found["exact"] == 0  # no token for the answer
    asked = ["answer", "--checkpoint", home, "--video", *clips, "--question"]
    assert [one["question"] for one in said_by(*asked, "红色", "[SEP]")] == ["红色", "[SEP]"]
    questions = [f"红色{number}" for number in "一二三四五六七八九"]
    found = said_by("answer", "--checkpoint", home, "--video", clips[0], "--question", *questions)
    assert [(one["question"], one["video"]) for one in found] == [(one, str(clips[0])) for one in questions]
    assert predict.main([*map(str, asked), "红" * 12]) == 2
    assert "has 12 tokens, of which this run reads 11" in capsys.readouterr().err


def test_questions_belong_to_files(tmp_path: Path) -> None:
    clips = [videos.write(tmp_path / name) for name in ("a.mp4", "b.mp4")]
    base = ["answer", "--checkpoint", "run", "--video", *map(str, clips)]

    def asked(*flags: str) -> list[str]:
        args = predict_flags.parse([*base, *flags], "")
        predict_flags.check(args)
        return args.title

    assert asked("--question", "红色", "蓝色") == ["红色", "蓝色"] and asked("--question", "红色") == ["红色"] * 2
    for flags, what in (
        (["--question", *"红色的"], "--question: 3 questions for 2 files"),
        (["--question", "?"], "nothing is left after cleaning"),
        ([], "--question: missing"),
        (["--question", "红色", "--title", "红色", "蓝色"], "--title: answer does not use it"),
    ):
        with pytest.raises(Mistake, match=what):
            asked(*flags)
