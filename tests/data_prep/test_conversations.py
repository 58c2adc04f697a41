"""Parsing of conversations: introductions, placeholders, answers, reject reasons and unusable files."""

import json
from pathlib import Path

import pytest

from data_prep import conversations
from data_prep.conversations import read_talks
from data_prep.row_table import write_table
from ymplug_jax.data import conversation

ASK = "Human: <|video|>\nHuman: 有什么？\nAI: 一只猫。"


def read(folder: Path, *rows: object, name: str = "x.jsonl") -> list[conversations.Talk]:
    """Parse rows: strings are lines as they are, other values are written as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return read_talks(folder / name)


def test_files_are_those_of_the_placeholders_in_their_order(tmp_path: Path):
    text = "Human: <image>\nHuman: <|video|>\nHuman: 比较<image>。\nAI: 好。\nHuman: 再看<|video|>\nAI: 看了。"
    row = {"video": ["1.mp4", "2.mp4"], "image": ["a.png", "b.png"], "text": text, "task_type": "x_sft"}
    (talk,) = read(tmp_path, row | {"options": [" 看了。\r\n", "没看。"]})
    assert talk.options == ("看了。", "没看。")
    assert talk.media == ((True, "a.png"), (False, "1.mp4"), (True, "b.png"), (False, "2.mp4"))
    assert (talk.number, talk.media_id, talk.task_type, talk.problem) == (0, "a.png", "x_sft", "")
    assert talk.text == f"{conversation.SYSTEM}\n{text}"


def test_the_introduction(tmp_path: Path):
    """The model's own one is added; a prompt replaces it; a text that does not begin with a turn brings its own."""
    texts = [
        talk.text
        for talk in read(
            tmp_path,
            {"text": "Human: 你好\nAI: 你好。", "prompt": ""},
            {"text": "Human: 你好\nAI: 你好。", "prompt": "请简短回答。"},
            {"text": "你是助手。\nHuman: 你好\nAI: 你好。"},
            {"text": "\n Human: 你好\r\nAI: 你好。 \r\n", "prompt": None, "video": None, "image": []},
            {"text": "<image>\nAI: 猫", "image": "a.png"},
        )
    ]
    talk, system = "Human: 你好\nAI: 你好。", conversation.SYSTEM
    ours = f"{system}\n{talk}"
    assert texts == [ours, f"请简短回答。\n{talk}", f"你是助手。\n{talk}", ours, f"{system}\n<image>\nAI: 猫"]


REJECTS = [
    ("{", "bad_json", "not JSON: "),
    ("[1]x", "bad_json", "not JSON: Extra data at column 4"),
    ('"text"', "bad_json", "not a JSON object but a str"),
    ('{"text": "Human: a\\nAI: b", "text": "Human: c\\nAI: d"}', "bad_json", "a key occurs twice"),
    ("[" * 100_000, "bad_json", "not JSON: "),
    ({"text": 3}, "bad_row", "text is a int, not a string"),
    ({"text": ASK, "video": [3]}, "bad_row", "video is not a list of paths"),
    ({"text": ASK, "video": {"a": 1}}, "bad_row", "video is not a list of paths"),
    ({"text": ASK, "video": [" "]}, "bad_row", "video holds an empty path"),
    ({"text": ASK, "video": ["a\n.mp4"]}, "bad_row", "video holds a control character (U+000A)"),
    ({"text": ASK + "\x1b[2J", "video": ["a.mp4"]}, "bad_row", "text holds a control character (U+001B)"),
    ('{"text": "Human: a\\nAI: \\ud83d"}', "bad_row", "text holds half a surrogate pair (U+D83D)"),
    ({"text": ASK, "videos": ["a.mp4"]}, "bad_row", "a field 'videos', which is not read; write 'video'"),
    ({"conversations": [], "video": ["a.mp4"]}, "bad_row", "write 'text'"),
    ({"text": "AI: b", "prompt": "x\nHuman: a"}, "bad_row", "prompt holds turns or placeholders"),
    ({"text": "AI: b", "prompt": "Human: a"}, "bad_row", "prompt holds turns or placeholders"),
    ({}, "empty_text", "text is empty"),
    ({"text": " \n"}, "empty_text", "text is empty"),
    ({"text": "Human: <video>\nAI: b", "video": ["a.mp4"]}, "unknown_placeholder", "<video> is no placeholder"),
    ({"text": "Human: <|image|>\nAI: b", "image": ["a"]}, "unknown_placeholder", "<|image|> is no placeholder"),
    ({"text": "Human: <ImageHere> <IMG>\nAI: b"}, "unknown_placeholder", "<ImageHere> is no placeholder"),
    ({"text": ASK}, "media_count", "1 <|video|> in text, 0 files in video"),
    ({"text": ASK, "video": ["a", "b"]}, "media_count", "1 <|video|> in text, 2 files in video"),
    ({"text": ASK, "image": ["a"]}, "media_count", "0 <image> in text, 1 files in image"),
    ({"text": "Human: a\nAI: 看<image>", "image": ["a"]}, "media_in_answer", "<image> in or behind answer 1"),
    ({"text": "Human: a\nAI: b\n<image>\nHuman: c\nAI: d", "image": ["a"]}, "media_in_answer", "behind answer 1"),
    ({"text": "Human: a"}, "no_answer", "no line starts with 'AI: '"),
    ({"text": "Human: OpenAI: b"}, "no_answer", "no line starts with 'AI: '"),
    ({"text": "Human: a\nAI:b"}, "no_answer", "write 'AI: ' with its space"),
    ({"text": "Human: a\nAI: b\nHuman:c\nAI: d"}, "bad_row", "answer 1 goes on with a line 'Human:'"),
    ({"text": "Human: a\nAI: "}, "no_answer", "answer 1 of 1 is empty"),
    ({"text": "Human: a\nAI: b\nHuman: c\nAI: \n\nHuman: d\nAI: e"}, "no_answer", "answer 2 of 3 is empty"),
    ({"text": "Human: a\nAI: b", "options": "b"}, "bad_row", "options is not a list of strings"),
    ({"text": "Human: a\nAI: b", "options": ["b", 3]}, "bad_row", "options is not a list of strings"),
    ({"text": "Human: a\nAI: b", "options": ["b"]}, "bad_options", "options are not two or more different texts"),
    ({"text": "Human: a\nAI: b", "options": []}, "bad_options", "options are not two or more different texts"),
    (
        {"text": "Human: a\nAI: b", "options": ["b", " b "]},
        "bad_options",
        "options are not two or more different texts",
    ),
    ({"text": "Human: a\nAI: b", "options": ["b", " "]}, "bad_options", "options are not two or more different texts"),
    ({"text": "Human: a\nAI: b", "options": ["c", "b<image>"]}, "bad_options", "an option holds turns or placeholders"),
    ({"text": "Human: a\nAI: b", "options": ["b", "AI: c"]}, "bad_options", "an option holds turns or placeholders"),
    (
        {"text": "Human: a\nAI: b\nHuman: c\nAI: d", "options": ["b", "c"]},
        "bad_options",
        "the last answer, 'd', is not",
    ),
    ({"text": "Human: a\nAI: b", "options": ["b", "c\x07"]}, "bad_row", "options holds a control character (U+0007)"),
    ({"text": "Human: a\nAI: " + "b" * 2**20}, "too_long", "more than 1,048,576 bytes"),
]


def test_every_bad_row_has_its_reason_and_line(tmp_path: Path):
    good = {"text": "Human: a < b，<p>和<table>，<imagined>\nAI: 好\u2028的\t。"}
    talks = read(tmp_path, good, *(row for row, _, _ in REJECTS), good)
    assert [talk.number for talk in talks] == list(range(len(REJECTS) + 2))
    for line, (talk, (row, reason, problem)) in enumerate(zip(talks[1:-1], REJECTS, strict=True), 2):
        assert (talk.reason, talk.text, talk.media) == (reason, "", ()), row
        assert talk.problem.startswith(f"line {line}: ") and problem in talk.problem and "\n" not in talk.problem
        assert reason in {**conversations.REASONS, "bad_row": ""}
    assert not talks[0].problem and not talks[-1].problem, "the row behind the huge line is read"
    assert talks[-1].media_id == f"x.jsonl:{len(REJECTS) + 2}" and talks[-1].text.endswith("好\u2028的\t。")


def test_lines_and_arrays(tmp_path: Path):
    row = {"text": "Human: a\nAI: b"}
    lines = f"\ufeff{json.dumps(row)}\r\n\r\n \t\n{json.dumps(row)}\r\n\ufeff{json.dumps(row)}"
    talks = read(tmp_path, lines)
    assert [(talk.number, talk.media_id, talk.problem) for talk in talks] == [
        (0, "x.jsonl:1", ""), (1, "x.jsonl:4", ""), (2, "x.jsonl:5", ""),
    ]  # fmt: skip
    array = read(tmp_path, "\ufeff" + json.dumps([row, 3, row], indent=1), name="x.json")
    assert [(talk.media_id, talk.reason) for talk in array] == [
        ("x.json:1", ""),
        ("x.json:2", "bad_json"),
        ("x.json:3", ""),
    ]
    assert array[0].text == talks[0].text
    assert write_table(talks, tmp_path)[0] == (3, 1, [("x.jsonl:1", 3)])
    assert write_table(array, tmp_path)[0] == (3, 1, [("x.json:1", 2)])
    assert write_table(read(tmp_path, "{", "{", row), tmp_path)[0] == (3, 0, []), "rejects are not counted"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no rows; write one JSON object per line"),
        (b"\xef\xbb\xbf\n \n", "no rows"),
        (b"[]", "no rows"),
        (
            b'[{"text": "a"},\n{"text" "b"}]',
            "line 2: the file begins with [ but is no JSON array (Expecting ':' delimiter",
        ),
        (b'[{"text": 1, "text": 2}]', "is no JSON array (a key occurs twice among text, text)"),
        ('{"text": "a"}\n{"text": "打滚"}'.encode("gbk"), "line 2: not UTF-8 at byte 10 of the line (it may be GBK"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8 but UTF-16; save it as UTF-8"),
        ('["打滚"]'.encode("gbk"), "line 1: not UTF-8"),
        (
            b"version https://git-lfs.github.com/spec/v1\nsize 3\n",
            "a Git LFS pointer, not the file itself; run git lfs",
        ),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "x.jsonl").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        read_talks(tmp_path / "x.jsonl")
    assert str(caught.value).startswith(str(tmp_path / "x.jsonl")) and message in str(caught.value)
