"""The Python API on tiny runs: its answers are those of `predict`, its errors are one line, and its documentation runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np
import pytest

import answering
import chats
import ymplug_jax
from configs.tiny import caption as caption_config
from ymplug_jax import api, predict
from ymplug_jax.convert.store import Store
from ymplug_jax.core import config, state
from ymplug_jax.core.exits import Mistake
from ymplug_jax.tasks import names
from ymplug_jax.training import setup

DOCS = answering.ROOT / "docs" / "python.md"
CLIPS = ["clips/kitten.mp4", "clips/football.mkv"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the documentation names: runs, clips, and a conversion."""
    home = tmp_path_factory.mktemp("api")
    data = None
    for task in ("classify", "caption", "retrieve"):
        data = answering.train(home, task, f"runs/{task}", data)
    answering.draw_videos(home, *CLIPS)
    chats.run_folder(home).rename(home / "runs" / "instruct")
    chats.picture(home / "clips" / "poster.png", 200)
    (home / "clips" / "broken.mp4").write_bytes(b"")
    convert(home / "converted" / "youku", tiny().to_dict())
    return home


@pytest.fixture(autouse=True)
def _there(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)


def tiny(arg: str = "gpt3") -> Any:
    """The settings of the conversion."""
    settings = caption_config.get_config(arg)
    with settings.unlocked():
        settings.options.new_tokens = 6
        settings.data.examples = 64
    return settings


def convert(out: Path, settings: Mapping[str, Any], **sizes: Any) -> None:
    """Fresh parameters of the settings, stored as a conversion stores them, with `sizes` changed in its record."""
    run = setup.prepare(config.from_config_dict(settings), jax.devices()[:1])
    params = {path: np.asarray(value) for path, value in state.flatten(setup.fresh_params(run)[0]).items()}
    store = Store(out, {})
    for path, value in params.items():
        store.write(path, None, value, value.shape)
        store.wrote(path)
    model = {**settings["model"], "llm": {**settings["model"]["llm"], **sizes}}
    store.finish(sorted(params), {"model": "mplug_video", "sizes": {"MPLUGVideo": model}})


def asked(capsys: pytest.CaptureFixture, command: str, *flags: str) -> list[dict[str, Any]]:
    """The answers of `predict`."""
    assert predict.main([command, "--checkpoint", f"runs/{command}", "--json", *flags]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_answers_are_those_of_predict(capsys: pytest.CaptureFixture) -> None:
    captions = ymplug_jax.load("runs/caption").caption(CLIPS)
    assert captions == [answer["caption"] for answer in asked(capsys, "caption", "--video", *CLIPS)]

    model = ymplug_jax.load(Path("runs/classify"))
    assert repr(model) == "<VideoModel runs/classify: task 'classify', classify()>"
    for titles in (None, ["小猫打滚", ""]):
        found = model.classify([Path(clip) for clip in CLIPS], titles, best=3)
        flags = ["--title", *titles] if titles else []
        answers = asked(capsys, "classify", "--best", "3", "--video", *CLIPS, *flags)
        fields = [(a["video"], a["class"], a["best"], a["head"], a["shown"]) for a in answers]
        assert [(c.video, c.name, c.scores, c.head, c.shown) for c in found] == fields
    assert [c.shown for c in found] == ["video and title", "video"] and len(found[0].scores) == 3

    model, texts = ymplug_jax.load("runs/retrieve"), ["红色的圆形在移动", "蓝色"]
    videos, words = model.embed_videos(CLIPS), model.embed_texts(texts)
    assert videos.dtype == words.dtype == np.float32 and videos.shape == words.shape
    np.testing.assert_allclose(np.linalg.norm(np.concatenate([videos, words]), axis=1), 1, atol=1e-5)
    assert asked(capsys, "retrieve", "--video", *CLIPS, "--text", *texts, "--export", "index.npz")
    with np.load("index.npz") as index:
        np.testing.assert_array_equal(index["video"], videos)
    for text, scores in zip(texts, words @ videos.T, strict=True):
        ranking = [[CLIPS[i], round(float(scores[i]), 4)] for i in np.argsort(-scores, kind="stable")]
        (answer,) = asked(capsys, "retrieve", "--video", *CLIPS, "--text", text)
        assert answer["ranking"] == ranking


def test_nothing_in_nothing_out() -> None:
    model = ymplug_jax.load("runs/retrieve", needs="retrieve")
    width = model.embed_texts(["红色"]).shape[1]
    assert model.embed_videos([]).shape == model.embed_texts([]).shape == (0, width)
    assert ymplug_jax.load("runs/caption").caption([]) == []
    assert ymplug_jax.load("runs/classify").classify([], []) == []


def test_mistakes_are_one_line_with_the_name() -> None:
    def refused(message: str, ask: Any, *args: Any, **more: Any) -> None:
        with pytest.raises(Mistake, match=message) as caught:
            ask(*args, **more)
        assert "\n" not in str(caught.value)

    model = ymplug_jax.load("runs/caption")
    refused(r"classify\(\): runs/caption is a run of task 'caption', which offers caption\(\)", model.classify, CLIPS)
    refused(r"task 'caption'.*offers caption\(\); load another run", model.embed_texts, ["红色"])
    refused("^clips/broken.mp4: empty_file: zero bytes", model.caption, [CLIPS[0], "clips/broken.mp4"])
    refused("^clips/none.mp4: missing_file: no such file", model.caption, ["clips/none.mp4"])
    refused("^clips: a folder, not a file; list the video files in it", model.caption, ["clips"])
    refused("^paths: 'clips/kitten.mp4' is a single value; give a list", model.caption, CLIPS[0])
    titled = ymplug_jax.load("runs/classify")
    refused("^titles: 1 titles for 2 files; give one for each", titled.classify, CLIPS, ["小猫"])
    for best in (0, 2.5, "3", None):
        refused("^best=.*: not a whole number of at least 1; give 1 or more", titled.classify, CLIPS, best=best)
    refused("^titles: None: not a str", titled.classify, CLIPS[:1], [None])
    searched = ymplug_jax.load("runs/retrieve")
    for texts in ([1], [None], ["红色", b"red"]):
        refused("^texts: .*: not a str; give texts", searched.embed_texts, texts)
    refused("^texts: '.ud800': holds a character that is not Unicode", searched.embed_texts, ["\ud800"])
    for values in ({"红色", "蓝色"}, {"红色": 1}, None, 3):
        refused("^texts: a .*, whose order is not that of the answers; give a list", searched.embed_texts, values)
    for path in ("", None, 3):
        refused("^paths: .*: not the path of a file", model.caption, [path])
    refused("^paths: .* is a single value; give a list", model.caption, PurePath(CLIPS[0]))
    assert model.caption([os.fsencode(CLIPS[0])]) == model.caption(CLIPS[:1])
    refused(
        "^needs='search': unknown; give one of caption, classify, answer, retrieve, chat",
        ymplug_jax.load,
        ".",
        needs="search",
    )
    refused("^texts: ' ': nothing is left", ymplug_jax.load("runs/retrieve").embed_texts, ["红色", " "])
    refused(
        "runs/caption is a run of task 'caption'; classify needs a run of task",
        ymplug_jax.load,
        "runs/caption",
        needs="classify",
    )
    refused(
        "^config=x.py: runs/caption is a run and keeps its own; leave config out",
        ymplug_jax.load,
        "runs/caption",
        config="x.py",
    )
    refused("^nowhere: no such folder; give the --workdir of a run", ymplug_jax.load, "nowhere")
    refused("^runs: no config.json here, but runs caption, classify, instruct, retrieve", ymplug_jax.load, "runs")


def test_the_best_step_is_a_run_of_its_own() -> None:
    run = Path("runs/retrieve")
    shutil.copytree(run, run / "best", ignore=shutil.ignore_patterns("frozen", "best"))
    try:
        expected = ymplug_jax.load(run).embed_texts(["红色"])
        np.testing.assert_array_equal(ymplug_jax.load(run / "best").embed_texts(["红色"]), expected)
    finally:
        shutil.rmtree(run / "best")


def test_a_conversion_takes_settings_and_a_tokenizer(tmp_path: Path) -> None:
    folder, given = "converted/youku", {"config": tiny(), "tokenizer": "t.model"}
    model = ymplug_jax.load(folder, **given)
    (caption,) = model.caption(CLIPS[:1])
    assert isinstance(caption, str) and model.methods == ("caption",)

    other = tiny()
    other.model.llm.depth += 1
    convert(tmp_path / "base", tiny().to_dict(), ln_eps=0.1)
    for name, changed, message in (
        (folder, {"config": None}, r"has no config.json and no tokenizer; .*ymplug_jax.load\(folder, config="),
        (folder, {"tokenizer": None}, "has no tokenizer; give tokenizer=FILE"),
        (folder, {"tokenizer": "none.model"}, "^tokenizer=none.model: no such file"),
        (folder, {"config": "none.py"}, "none.py: no such file"),
        (folder, {"config": other}, "does not fit the model of this config.* other shape"),
        (folder, {"needs": "classify"}, "task 'caption'; classify needs a run of task"),
        (tmp_path / "base", {}, "its language model has ln_eps=0.1"),
    ):
        with pytest.raises(Mistake, match=message):
            ymplug_jax.load(name, **given | changed)


def test_a_script_needs_no_main_guard(home: Path) -> None:
    """Decoding processes must not run the script again."""
    (home / "script.py").write_text(
        "import ymplug_jax\nprint('begin')\nprint(ymplug_jax.load('runs/caption').caption(['clips/kitten.mp4']))\n"
    )
    code = [sys.executable, "-c", "import runpy; runpy.run_path('script.py', run_name='__main__')"]
    for command in ([sys.executable, "script.py"], code):
        env = answering.runs.environment() | {"PYTHONPATH": str(answering.ROOT)}
        done = subprocess.run(command, cwd=home, env=env, text=True, capture_output=True, timeout=300)
        assert done.returncode == 0 and done.stdout.count("begin") == 1, done.stderr


def test_the_documentation_names_the_methods_of_every_task() -> None:
    lines = re.findall(r"^\| (`[a-z0-9_`, ]+) \| (`.*`) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    found = {task: re.findall(r"`(\w+)\(", offered) for tasks, offered in lines for task in re.findall(r"\w+", tasks)}
    expected = {name: getattr(module, "ANSWERS", ()) for name, module in names.tasks().items()}
    assert {task: list(api.METHODS[command]) for task, commands in expected.items() for command in commands} == {
        task: methods for task, methods in found.items() if methods
    }


def test_the_examples_of_the_documentation_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """In their order, in one session, with the tiny model's settings in place of the released one's."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 7 and any("embed_videos" in block for block in blocks)
    shutil.copy("t.model", "tokenizer.model")
    Path("settings.py").write_text("import test_api\n\ndef get_config():\n    return test_api.tiny()\n")
    stand_ins = {
        "configs/mplug_video/caption.py:1.3b": "settings.py",
        "from configs.mplug_video import caption": "from configs.tiny import caption",
        'get_config("1.3b")': "get_config()",
        "tokenizer.json": "tokenizer.model",
    }
    session: dict[str, Any] = {}
    for block in blocks:
        for name, own in stand_ins.items():
            block = block.replace(name, own)
        exec(compile(block, str(DOCS), "exec"), session)
    printed = capsys.readouterr().out
    assert "<VideoModel runs/caption: task 'caption', caption()>" in printed
    assert "classify(): converted/youku" in printed and "clips/missing.mp4: missing_file" in printed
