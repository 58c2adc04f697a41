"""`predict chat` on a stored run: questions of the command line, of stdin, of a file and of a terminal."""

import codecs
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from etils import epath

import chats
import runs
from answering import ROOT, draw_videos
from ymplug_jax import predict as predict_lib
from ymplug_jax.core import verified_read
from ymplug_jax.data import conversation
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_path import resolve
from ymplug_jax.inference import chat, chat_questions, chat_session, settings
from ymplug_jax.inference.chat_session import Session


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run in `chat`, a clip and an image; the current folder of these tests."""
    home = tmp_path_factory.mktemp("chat")
    chats.run_folder(home)
    draw_videos(home, "a.mp4")
    chats.picture(home / "b.png", 200)
    before = os.getcwd()
    os.chdir(home)
    yield home
    os.chdir(before)


@pytest.fixture(autouse=True, scope="module")
def one_model() -> Iterator[None]:
    """Commands of this file share their programs, which are compiled once."""
    made, models = chat.ChatModel, {}

    class Kept(made):
        def __new__(cls, predictor: object) -> object:
            return models.setdefault("one", made(predictor)) if not models else models["one"]

    chat.ChatModel, closed = Kept, made.close
    made.close = lambda self: None
    yield
    chat.ChatModel, made.close = made, closed
    for model in models.values():
        model.close()


@pytest.fixture
def ask(home: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """(code, stdout, lines of stderr) of a command in this process; `stdin` is piped."""

    def run(*flags: str | Path, stdin: str | bytes = "") -> tuple[int, str, list[str]]:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
        capsys.readouterr()
        code = predict_lib.main(["chat", "--checkpoint", "chat", "--new_tokens", "6", *map(str, flags)])
        out, err = capsys.readouterr()
        return code, out, err.splitlines()

    return run


def test_questions_of_the_command_line(ask: Callable) -> None:
    code, out, err = ask("--video", "a.mp4", "--question", "视频里有什么？", "再说", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [answer["question"] for answer in answers] == ["视频里有什么？", "再说"]
    assert answers[0]["tokens"] < answers[1]["tokens"] and all(a["ended"] in ("length", "end") for a in answers)
    code, out, _ = ask("--video", "a.mp4", "--question", "视频里有什么？", "再说")
    assert code == 0 and out == "".join(escaped(answer["answer"]) + "\n" for answer in answers)
    cut = "the answer is cut at its largest number of tokens; --new_tokens gives more"
    assert err == [cut] * sum(answer["ended"] == "length" for answer in answers)
    one = ask("--image", "b.png", "--question", "视频里有什么？", "--json", "--seed", "1", "--temperature", "2")[1]
    assert json.loads(one)["answer"] != answers[0]["answer"]
    assert (
        one == ask("--image", "b.png", "--question", "视频里有什么？", "--json", "--seed", "1", "--temperature", "2")[1]
    )


def escaped(text: str) -> str:
    from ymplug_jax.inference.chat_terminal import printable

    return printable(text)


def test_stdin_holds_questions_and_commands(ask: Callable, home: Path) -> None:
    lines = [
        "/video a.mp4",
        "视频里有什么？",
        "",
        "/vidoe a.mp4",
        "/video none.mp4",
        "/image",
        "//说",
        "/save talk.json",
    ]
    code, out, err = ask(
        "--json", stdin="\n".join([*lines, "/save talk.json", "/reset", "说", "/save! talk.json", "/quit", "说"])
    )
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and [answer["question"] for answer in answers] == ["视频里有什么？", "/说", "说"]
    assert [line for line in err if line.startswith("error:")] == [
        "error: /vidoe: unknown command; did you mean /video?",
        "error: none.mp4: missing_file: no such file; give another file",
        "error: /image: no file; give one, such as /image a.jpg",
        "error: /save talk.json: the file exists; /save! talk.json replaces it",
    ]
    saved = json.loads(Path("talk.json").read_text(encoding="utf-8"))
    assert [turn["question"] for turn in saved["turns"]] == ["说"] and saved["turns"][0]["video"] == []
    assert not list(Path().glob(".talk_*"))
    code, _, err = ask(stdin="/save nowhere/x.json\n/save .\n/save\n/xyz\n")
    assert code == 1 and err == [
        "error: /save nowhere/x.json: no such folder nowhere; create it first",
        "error: /save .: a folder, not a file; give a file in it",
        "error: /save: no file; give one, such as /save talk.json",
        "error: /xyz: unknown command; /help lists all",
    ]
    assert ask(stdin=b"\xff\n") == (2, "", ["error: line 1 of stdin: not UTF-8; convert the questions"])


def test_saved_transcripts_name_the_media_of_each_turn(ask: Callable) -> None:
    ask("--video", "a.mp4", stdin="一\n二\n/image b.png\n三\n/save media.json\n")
    turns = json.loads(Path("media.json").read_text(encoding="utf-8"))["turns"]
    assert [(turn["video"], turn["image"]) for turn in turns] == [(["a.mp4"], []), ([], []), ([], ["b.png"])]


ROWS = [
    {"id": 7, "video": ["a.mp4"], "question": "视频里有什么？"},
    {"video": "a.mp4", "image": ["b.png"], "question": "说"},
    {"video": ["../a.mp4"], "question": "说"},
    {"image": ["none.png"], "question": "说"},
    {"question": ""},
    {"question": "说 " * 400},
    {"question": "说"},
]


def test_a_file_of_questions(ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS) + "\n{]\n"
    Path("q.jsonl").write_text(text, encoding="utf-8")
    command = ["--questions", "q.jsonl", "--out", "out.jsonl"]
    code, out, err = ask(*command)
    assert (code, out) == (1, "")
    assert err == [
        "out.jsonl: 8 rows = 3 answers + 5 rejects, bad_json: 1, bad_row: 1, hostile_path: 1, missing_file: 1, too_long: 1"
    ]
    rows = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 9] and rows[0]["id"] == 7
    assert not list(Path().glob("out.jsonl.*"))
    alone = json.loads(ask("--video", "a.mp4", "--question", ROWS[0]["question"], "--json")[1])
    assert rows[0]["answer"] == alone["answer"]
    assert ask(*command)[2] == ["error: --out out.jsonl: exists; remove it, or give another file"]

    # An interrupted command continues; a half-written line is answered again.
    asked: list[str] = []
    first = Session.ask

    def stops(self: Session, question: str) -> chat_session.Answer:
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(question)
        return first(self, question)

    whole = Path("out.jsonl").read_bytes()
    Path("out.jsonl").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(Session, "ask", stops)
        assert ask(*command)[0] == 130 and not Path("out.jsonl").exists()
    with Path("out.jsonl.part").open("ab") as file:
        file.write(b'{"line": 2, "vid')
    assert ask(*command, "--seed", "1")[2] == [
        "error: out.jsonl.part: begun with another style; remove it to begin again, or give another --out"
    ]
    Path("q.jsonl").write_text(text.replace('"a.mp4"', '"c.mp4"', 1), encoding="utf-8")
    assert ask(*command)[2] == [
        "error: out.jsonl.part: answers other questions than q.jsonl; remove it, or give another --out"
    ]
    Path("q.jsonl").write_text(text, encoding="utf-8")
    code, _, err = ask(*command)
    assert err[0] == "out.jsonl.part: 1 rows are already answered" and Path("out.jsonl").read_bytes() == whole


def test_the_introduction_of_the_training(ask: Callable, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run's own, that of a row, that of the command; part files of another one are not continued."""
    read = chat_session.transcript
    seen: list[str] = []
    monkeypatch.setattr(chat_session, "transcript", lambda *given: (seen.append(given[1]), read(*given))[1])
    rows = [{"question": "说", "prompt": prompt} for prompt in (None, "", " 自己的\n", "a\nAI: b", 3)]
    Path("p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["--questions", "p.jsonl", "--out", "p.out"]
    assert ask(*command, "--introduction", " 看 ")[0] == 1 and seen == ["看", "看", "自己的"]
    answers = [json.loads(line) for line in Path("p.out").read_text(encoding="utf-8").splitlines()]
    assert answers[2]["prompt"] == " 自己的\n" and [answer.get("error") for answer in answers[3:]] == [
        'bad_row: "prompt" holds turns or placeholders; give only the text before the first turn',
        'bad_row: "prompt" is not a text',
    ]
    seen.clear()
    assert ask("--question", "说", "--introduction", "", "--json")[0] == 0 and seen == [""]
    for bad in ("Human: x", "<image>"):
        assert ask("--question", "说", "--introduction", bad) == (
            2, "", ["error: --introduction: holds turns or placeholders; give only the text before the first turn"],
        )  # fmt: skip
    try:
        Path("chat/introduction.txt").write_text("看一看\n", encoding="utf-8")
        assert settings.of_run(epath.Path("chat")).introduction == "看一看"
        for content, what in (
            (b"\xff\n", "damaged, not UTF-8"),
            (b"ab", "damaged, does not end"),
            (b"AI: \n", "holds turns"),
        ):
            Path("chat/introduction.txt").write_bytes(content)
            code, out, err = ask("--question", "说")
            assert (code, out, len(err)) == (2, "", 1) and f"chat/introduction.txt: {what}" in err[0]
    finally:
        Path("chat/introduction.txt").unlink()
    assert settings.of_run(epath.Path("chat")).introduction == conversation.SYSTEM


def test_a_damaged_run_is_one_line(ask: Callable, capsys: pytest.CaptureFixture) -> None:
    """That names the file in the run's folder; nothing of what reads it is printed."""
    shutil.copytree("chat", "bad")
    settings_file, vocabulary = Path("bad/config.json"), Path("bad/tokenizer/tokenizer.json")
    text = settings_file.read_text(encoding="utf-8")
    plain = json.loads(text)
    plain["data"]["tokenizer"] = ""
    settings_file.write_text(json.dumps(plain), encoding="utf-8")
    line = "error: bad/config.json: damaged, config.data.tokenizer is empty; restore a copy"
    assert ask("--checkpoint", "bad", "--question", "说") == (2, "", [line])
    settings_file.write_text(text, encoding="utf-8")
    vocabulary.write_text("", encoding="utf-8")
    line = "error: bad: tokenizer bad/tokenizer/tokenizer.json: empty; download it again"
    assert ask("--checkpoint", "bad", "--question", "说") == (2, "", [line])
    manifest = Path("bad/checkpoints/frozen/manifest.ocdbt")
    manifest.write_bytes(manifest.read_bytes()[:50])
    with pytest.raises(verified_read.Damaged, match="frozen: cannot be read"):
        verified_read.stored_in(epath.Path("bad/checkpoints/frozen").resolve())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (r'{"question": "\ud800"}', 'bad_row: "question" holds half a surrogate pair'),
        ('{"question": "说", "video": ""}', 'bad_row: "video" is not a list of file names'),
        ('{"question": "说", "image": 0}', 'bad_row: "image" is not a list of file names'),
        ('{"question": "说", "images": ["b.png"]}', 'bad_row: a field "images", which is not read; write "image"'),
        (
            '{"question": "说", "question": "再说"}',
            "bad_json: a key occurs twice among question, question; write it once",
        ),
    ],
)
def test_rows_that_would_be_misread_are_rejected(tmp_path: Path, row: str, problem: str) -> None:
    (tmp_path / "q.jsonl").write_text(row, encoding="utf-8")
    assert [one.problem for one in chat_questions.read(tmp_path / "q.jsonl")] == [problem]


def test_half_characters_in_names_and_questions(ask: Callable, tmp_path: Path) -> None:
    with pytest.raises(Reject, match="missing_file"):
        resolve(str(tmp_path), "\ud800.mp4")
    code, _, err = ask(stdin="/save a\0b\n")
    assert code == 1 and len(err) == 1 and err[0].endswith("no name of a file; give another")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top_p", "2"], "--top_p: 2.0 is out of range; give more than 0 and at most 1"),
        (["--top_k", "5", "--temperature", "0"], "--top_k: has no effect with temperature 0, which draws nothing; leave it out, or"),
        (["--beams", "3", "--top_k", "5"], "--top_k: a search with beams draws nothing; leave it out, or beams"),
        (["--seed", "-1"], "--seed=-1: out of range; give a whole number from 0 to 4294967295"),
        (["--top_k", "x"], "argument --top_k: invalid int value: 'x'; --help lists the flags"),
        (["--best", "3"], "--best: chat does not use it; leave it out"),
        (["--text", "x"], "--text: chat does not use it, only retrieve does; leave it out"),
        (["--questions", "q.jsonl"], "--out: missing; give the file for the answers to --questions"),
        (["--questions", "q.jsonl", "--out", "o", "--video", "a.mp4"], "--video: the rows of --questions say it; leave it out"),
        (["--out", "o.jsonl"], "--out: belongs to --questions; give both, or leave it out"),
        (["--questions", "none", "--out", "o.jsonl"], "--questions none: cannot be read (No such file or directory); give a file"),
        (["--question", " "], "--question ' ': nothing is left of it; give words"),
        (["--context", "9"], "context 9: too small for a clip and a question; give 20 or more"),
        (["--tokenizer", "t.json"], "tokenizer=t.json: chat is a run and keeps its own; leave tokenizer out"),
        (["--video", "b.mp4", "--question", "说"], "b.mp4: missing_file: no such file; give another file"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(ask: Callable, flags: list[str], message: str) -> None:
    code, out, err = ask(*flags)
    assert code == 2 and out == "" and len(err) == 1 and err[0].startswith(f"error: {message}")


def test_other_commands_refuse_the_flags_of_chat(home: Path, capsys: pytest.CaptureFixture) -> None:
    assert predict_lib.main(["caption", "--checkpoint", "chat", "--video", "a.mp4", "--question", "说"]) == 2
    assert predict_lib.main(["caption", "--checkpoint", "chat", "--video", "a.mp4"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: --question: caption does not use it, only answer or chat does; leave it out",
        "error: chat is a run of task 'mplug_chat_instruct'; caption needs a run of task caption, mplug2_caption or pretrain",
    ]


def test_a_terminal(home: Path) -> None:
    """In a process of its own: the first piece comes before the answer ends, Ctrl-C stops an answer, at the prompt it ends."""
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "ymplug_jax.predict",
        "chat",
        "--checkpoint",
        "chat",
        "--new_tokens",
        "2500",
        "--context",
        "3000",
    ]
    env = runs.environment() | {"PYTHONPATH": str(ROOT), "TERM": "dumb"}
    process = subprocess.Popen(
        command, cwd=home, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    seen, decode = "", codecs.getincrementaldecoder("utf-8")("replace").decode  # a read may end inside a character

    def until(pattern: str, limit: float = 240) -> str:
        nonlocal seen
        end = time.monotonic() + limit
        while not (found := re.search(pattern, seen, re.DOTALL)):
            assert time.monotonic() < end, seen
            if select.select([ours], [], [], 0.2)[0]:
                seen += decode(os.read(ours, 4096))
        seen = seen[found.end() :]
        return found[0]

    try:
        until("ask, or /help\r\n> ")
        os.write(ours, b"/video a.mp4\n")
        until("shown: a.mp4\r\n> ")
        os.write(ours, "视频里有什么？\n".encode())
        until("？\r\n[^>]")  # the first piece of the answer
        process.send_signal(signal.SIGINT)
        assert "stopped\r\n> " in until("(stopped|the answer is cut|is full).*?> ")
        os.write(ours, b"/save talk_terminal.json\n")
        until("saved: talk_terminal.json\r\n> ")
        turns = json.loads((home / "talk_terminal.json").read_text(encoding="utf-8"))["turns"]
        assert [(turn["question"], turn["ended"], bool(turn["answer"])) for turn in turns] == [
            ("视频里有什么？", "stopped", True)
        ]
        process.send_signal(signal.SIGINT)
        until("stopped")
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("tmux") is None, reason="tmux is not installed; test_a_terminal drives the same program"
)
def test_tmux(home: Path) -> None:
    socket = home / "tmux"
    tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]
    env = runs.environment() | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    command = f"{sys.executable} -m ymplug_jax.predict chat --checkpoint chat --new_tokens 5 --video a.mp4; sleep 600"
    subprocess.run([*tmux, "-u", "new-session", "-d", "-x", "100", "-y", "30", command], cwd=home, env=env, check=True)

    def screen() -> str:
        return subprocess.run([*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True).stdout

    def until(pattern: str) -> str:
        for _ in range(600):
            if found := re.search(pattern, shown := screen(), re.DOTALL):
                return found[0]
            time.sleep(0.2)
        raise AssertionError(shown)

    def type_in(text: str) -> None:
        subprocess.run([*tmux, "send-keys", "-l", text], check=True)
        subprocess.run([*tmux, "send-keys", "Enter"], check=True)

    try:
        until("ask, or /help\n>")
        type_in("视频里有什么？")
        until("> 视频里有什么？\n.+\n>")
        type_in("/save talk_tmux.json")
        until("saved: talk_tmux.json\n>")
        type_in("/rest")
        until(r"did you mean /reset\?")
        type_in("/quit")
        (turn,) = json.loads((home / "talk_tmux.json").read_text(encoding="utf-8"))["turns"]
        assert turn["video"] == ["a.mp4"] and turn["ended"] in ("length", "end")
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
