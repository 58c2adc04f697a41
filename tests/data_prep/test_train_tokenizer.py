"""The tokenizer trainer: exact round trips, fixed ids, every kind of CSV, clear errors."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from data_prep import train_tokenizer
from data_prep.captions import captions_of
from data_prep.train_tokenizer import shares_of, texts_of, train
from ymplug_jax.data import conversation
from ymplug_jax.data.schema import COLUMNS

TITLES = [
    f"{colour}的{shape}在{motion}"
    for colour in ("红色", "蓝色", "黑色")
    for shape in ("圆形", "五角星", "十字形")
    for motion in ("向左移动", "慢慢变大")
]
ODD_TEXTS = [
    "",
    "红色的圆形",
    "  前后 都有  空格 ",
    "混合 mixed TEXT ①Ａﬁ",
    "表情😀👨‍👩‍👧",
    "一行\n两行\r\n\t三",
    "\u3000全角",
    "e\u0301",
    "<s></s><pad>",
    "⁇",
]


def write_csv(path: Path, kind: str, rows: list[tuple[str, ...]], encoding: str = "utf-8") -> Path:
    file, texts = COLUMNS[kind]
    with open(path, "w", newline="", encoding=encoding) as stream:
        csv.writer(stream).writerows([(file, *texts), *rows])
    return path


@pytest.fixture(scope="module")
def processor() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=train(iter(TITLES), 400))


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_round_trip_is_exact(processor, text: str):
    ids = processor.encode(text)
    assert processor.decode(ids) == text
    assert train_tokenizer.UNK not in ids


def test_fixed_ids(processor):
    assert (processor.pad_id(), processor.bos_id(), processor.eos_id(), processor.unk_id()) == (0, 1, 2, 3)
    assert [processor.is_byte(i) for i in (3, 4, 259, 260)] == [False, True, True, False]


def test_titles_split_into_words(processor):
    assert processor.encode("蓝色的五角星在向左移动", out_type=str) == ["蓝色的", "五角星在", "向左移动"]


def test_vocabulary_is_limited_by_the_texts():
    large = sentencepiece.SentencePieceProcessor(model_proto=train(iter(TITLES), 5000))
    small = sentencepiece.SentencePieceProcessor(model_proto=train(iter(TITLES), 285))
    assert small.vocab_size() == 285
    assert 285 < large.vocab_size() < 5000


def test_same_texts_same_model():
    assert train(iter(TITLES), 300) == train(iter(TITLES), 300)


def test_shares_count_bytes():
    shares = shares_of(train(iter(TITLES), 400), iter(["红色的圆形在向左移动", "龘"]))
    assert shares == (2, 6, 3, 0, 2)


def test_texts_of_every_kind(tmp_path: Path):
    pretrain = write_csv(
        tmp_path / "p.csv", "pretrain", [("a.mp4", "标题，一"), ("b.mp4", ""), ("c.mp4", "[搞笑]标题")]
    )
    assert list(texts_of(pretrain)) == ["标题，一", "[搞笑]标题"]
    classification = write_csv(tmp_path / "c.csv", "classification", [("a.mp4", "标题", "旅游"), ("b.mp4", "另一", "")])
    assert list(texts_of(classification)) == ["标题", "旅游", "另一"]
    retrieval = write_csv(tmp_path / "r.csv", "retrieval", [("a.mp4", "描述\n两行")], encoding="utf-8-sig")
    assert list(texts_of(retrieval)) == ["描述\n两行"]
    captioning = write_csv(tmp_path / "g.csv", "captioning", [("a.mp4", "一句"), ("b.mp4", "['二', '三，']")])
    assert list(texts_of(captioning)) == ["一句", "二", "三，"]


@pytest.mark.parametrize("cell", ["[搞笑] 标题", "[" * 5000])
def test_text_that_only_looks_like_a_list(cell: str):
    assert captions_of(cell) == ((cell,), "")


def test_cells_that_the_builder_rejects_are_left_out_with_a_note(tmp_path: Path, capsys):
    rows = [("a.mp4", "['一只猫' '两只猫']"), ("b.mp4", "[1, 2]"), ("c.mp4", "一只狗在跑"), ("d.mp4", "['没有结束")]
    table = write_csv(tmp_path / "g.csv", "captioning", rows)
    assert list(texts_of(table)) == ["一只狗在跑"]
    assert train_tokenizer.main(["--csv", str(table), "--out", str(tmp_path / "t.model"), "--vocab", "400"]) == 0
    assert (
        f"note: 3 cells or conversations were skipped; the first is {table}, line 2: golden_caption"
        in capsys.readouterr().err
    )


def test_conversations_are_texts_with_their_introduction(tmp_path: Path, capsys):
    file = tmp_path / "chats.jsonl"
    good = {"video": ["a.mp4"], "text": "Human: <|video|>\nHuman: 视频里有什么？\nAI: 一只猫。"}
    file.write_text("".join(f"{json.dumps(row)}\n" for row in (good, {"text": "没有回答"})), encoding="utf-8")
    assert list(texts_of(file)) == [f"{conversation.SYSTEM}\n{good['text']}"]
    assert train_tokenizer.main(["--csv", str(file), "--out", str(tmp_path / "t.model"), "--vocab", "400"]) == 0
    assert (
        f"note: 1 cells or conversations were skipped; the first is {file}, line 2: no line" in capsys.readouterr().err
    )


def test_a_fault_of_a_later_file_is_the_message(tmp_path: Path, capsys):
    good = write_csv(tmp_path / "p.csv", "pretrain", [("a.mp4", title) for title in TITLES])
    (tmp_path / "bad.csv").write_text("name,words\na,b\n", encoding="utf-8")
    files = [str(good), str(tmp_path / "bad.csv")]
    assert train_tokenizer.main(["--csv", *files, "--out", str(tmp_path / "t.model"), "--vocab", "400"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {files[1]}: unknown columns name,words; give a CSV")


def test_lines_end_at_newlines_only(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes("\ufeff一\u2028二\r\n三\x85四\x0b\n\n五\u2029".encode())
    assert list(texts_of(tmp_path / "t.txt")) == ["一\u2028二", "三\x85四\x0b", "五\u2029"]
    table = write_csv(tmp_path / "p.csv", "pretrain", [("a.mp4", "上\u2028下")])
    flags = [
        "--csv",
        str(table),
        "--out",
        str(tmp_path / "t.model"),
        "--texts",
        str(tmp_path / "o.txt"),
        "--vocab",
        "400",
    ]
    assert train_tokenizer.main(flags) == 0
    assert (tmp_path / "o.txt").read_bytes() == "上\u2028下\n".encode()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"name,words\na,b\n", [], "unknown columns name,words; give a CSV with"),
        (b"", [], "empty; write a header"),
        ("video_id:FILE,title\na.mp4,标题\n".encode("gbk"), [], "not UTF-8"),
        (b"video_id:FILE,title\na.mp4,\n", [], "hold no text"),
        (
            "video_id:FILE,title\na.mp4,标题\n".encode(),
            ["--vocab", "200"],
            "--vocab 200: special tokens and bytes need 260",
        ),
        ("video_id:FILE,title\na.mp4,一二三四五六七八九十\n".encode(), ["--vocab", "265"], "characters alone need 271"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, capsys, content: bytes, arguments: list[str], message: str):
    table, out = tmp_path / "t.csv", tmp_path / "t.model"
    table.write_bytes(content)
    assert train_tokenizer.main(["--csv", str(table), "--out", str(out), *arguments]) == 2
    (last,) = capsys.readouterr().err.split("\n")[:-1]
    assert last.startswith("error: ") and message in last
    assert [p.name for p in tmp_path.iterdir()] == ["t.csv"]


def test_command_is_quiet_and_writes_the_model(tmp_path: Path):
    table = write_csv(tmp_path / "p.csv", "pretrain", [(f"{i}.mp4", title) for i, title in enumerate(TITLES)])
    command = [
        sys.executable,
        "-m",
        "data_prep.train_tokenizer",
        "--csv",
        table,
        table,
        "--out",
        tmp_path / "m/t.model",
        "--texts",
        tmp_path / "texts.txt",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "note: the texts support" in done.stdout and "36 decode exactly" in done.stdout
    assert done.stderr == "", "no bars where there is no terminal"
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["t.model"]
    lines = (tmp_path / "texts.txt").read_text(encoding="utf-8").splitlines()
    assert lines == TITLES * 2
    assert list(texts_of(tmp_path / "texts.txt")) == lines
