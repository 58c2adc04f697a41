"""Parsing of CSVs, caption cells and class names, and resolution of file names."""

import unicodedata
from pathlib import Path

import pytest

from data_prep.captions import captions_of
from data_prep.rows import read_rows
from ymplug_jax.data.schema import parse_class_names
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_path import resolve

HEADER = "video_id:FILE,title\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + 'a.mp4,一\nb.mp4,"第一集\nc.mp4,第二集\nd.mp4,三\n', "lines 3 to 5: a quoted field does not end"),
        (
            HEADER + 'a.mp4,"第一集\nb.mp4,第二集"\n',
            "line 3: this line looks like a row (b.mp4), but is inside a quoted field that begins in line 2",
        ),
        (HEADER + 'a.mp4,"一\nb.mp4,二\nc.mp4,"三"\n', "lines 2 to 4: text follows a closing quote"),
        (HEADER + 'a.mp4,"一"二\n', "line 2: text follows a closing quote"),
        (HEADER + 'a.mp4,"一\n' + "b.mp4,很长的标题\n" * 20_000, "line 2 to "),
        (HEADER + "a.mp4,一\rb.mp4,二\r", "line 2: a carriage return inside a line"),
        ("title,title,video_id:FILE\n一,二,a.mp4\n", "column 'title' occurs 2 times"),
        ("video_id:FILE;title\na.mp4;一\n", "separator is ';', so save it with commas"),
        ("", "empty; write a header of video_id:FILE,title"),
        ("\ufeff" + HEADER, "no rows after the header"),
    ],
)
def test_broken_tables_name_the_line(tmp_path: Path, text: str, message: str):
    (tmp_path / "x.csv").write_bytes(text.encode())
    with pytest.raises(ValueError) as caught:
        read_rows(tmp_path / "x.csv", "pretrain")
    assert message.replace("line 2 to", "lines 2 to") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "message"), [("gbk", "line 3: not UTF-8 .*may be GBK"), ("utf-16", "not UTF-8 but UTF-16")]
)
def test_other_encodings_are_named(tmp_path: Path, encoding: str, message: str):
    (tmp_path / "x.csv").write_bytes((HEADER + "a.mp4,one\nb.mp4,小猫打滚\n").encode(encoding))
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "x.csv", "pretrain")


def test_unusual_but_valid_tables(tmp_path: Path):
    text = (
        "\ufeff" + HEADER + 'a.mp4,"第一行\n第二行, 3.5 分"\r\nb.mp4,上\u2028下\r\n\r\nc.mp4,一"二\n'
        "d.mp4,一,二\ne.mp4\nf.mp4,空\x00字\n"
    )
    (tmp_path / "x.csv").write_bytes(text.encode())
    rows = read_rows(tmp_path / "x.csv", "pretrain")
    assert [(row.media_id, row.title) for row in rows[:3]] == [
        ("a.mp4", "第一行\n第二行, 3.5 分"),
        ("b.mp4", "上\u2028下"),
        ("c.mp4", '一"二'),
    ]
    assert [bool(row.problem) for row in rows] == [False, False, False, True, True, True]
    assert "3 fields, but the header has 2" in rows[3].problem and "NUL" in rows[5].problem


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ("['一。', '二。']", ("一。", "二。")),
        ("[\"it's\", '二']", ("it's", "二")),
        ("一只猫", ("一只猫",)),
        ("[搞笑] 小猫打滚", ("[搞笑] 小猫打滚",)),
        ("[搞笑]", ("[搞笑]",)),
        ("[1] 第一集", ("[1] 第一集",)),
        ("(完) 大结局", ("(完) 大结局",)),
        ("", ()),
    ],
)
def test_captions(cell: str, captions: tuple[str, ...]):
    assert captions_of(cell) == (captions, "")


@pytest.mark.parametrize(
    "cell",
    ["['一' '二']", "['一'\n '二']", "['一', None]", "[None]", "[nan]", "[1, 2]", "[['一']]", "[]", "['']", "['一', ' ']", "['坏",
     "array(['一', '二'], dtype=object)", "('一', '二')", "[‘一’, ‘二’]", "['一', ...]", "['一', 'b' \"c\"]", "[f'一']", "None", "nan", "NaN", "<NA>"],
)  # fmt: skip
def test_cells_that_are_not_a_list_of_strings(cell: str):
    captions, problem = captions_of(cell)
    assert captions == () and problem.startswith("golden_caption ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("猫\n狗\n猫\n", "line 3: class name '猫' repeats line 1"),
        ("猫\n\n狗", "line 2: an empty line"),
        ("", "no class names"),
    ],
)
def test_class_names(text: str, message: str):
    assert parse_class_names("\ufeff猫\r\n狗\u2028\x85x\n", "n.txt") == ("猫", "狗\u2028\x85x")
    with pytest.raises(ValueError, match=message):
        parse_class_names(text, "n.txt")


def test_links_and_unicode_normalisation(tmp_path: Path):
    root, blobs, other = tmp_path / "snapshots/1", tmp_path / "blobs", tmp_path / "other"
    for folder in (root / "v", blobs, other):
        folder.mkdir(parents=True)
    (blobs / "f00").write_text("x")
    (other / "f").write_text("x")
    (root / "v/a.mp4").symlink_to("../../../blobs/f00")
    (root / "v/b.mp4").symlink_to(other / "f")
    (root / "v/real.mp4").write_text("x")
    (root / "v/c.mp4").symlink_to("real.mp4")
    (root / "v/loop.mp4").symlink_to("loop.mp4")
    assert resolve(str(root), "v/c.mp4") == root / "v/real.mp4"
    assert resolve(str(root), "v/a.mp4", [str(blobs)]) == blobs / "f00"
    for name, allowed in (("v/a.mp4", []), ("v/b.mp4", [str(blobs)]), ("../1/v/real.mp4", [])):
        with pytest.raises(Reject) as caught:
            resolve(str(root), name, allowed)
        assert caught.value.reason == "hostile_path"
    with pytest.raises(Reject) as caught:
        resolve(str(root), "v/loop.mp4")
    assert caught.value.reason == "missing_file"

    composed, decomposed = (unicodedata.normalize(form, "é/ガ.mp4") for form in ("NFC", "NFD"))
    assert composed != decomposed
    (root / decomposed).parent.mkdir()
    (root / decomposed).write_text("decomposed")
    assert resolve(str(root), composed).read_text() == "decomposed"
    (root / composed).parent.mkdir()
    (root / composed).write_text("composed")
    assert resolve(str(root), composed).read_text() == "composed"
    assert resolve(str(root), decomposed).read_text() == "decomposed"


def test_a_missing_caption_as_pandas_prints_it(tmp_path: Path):
    file = tmp_path / "retrieval_train.csv"
    file.write_text("clip_name:FILE,caption\na.mp4,nan\nb.mp4,nan 是什么\n", encoding="utf-8")
    rows = read_rows(file, "retrieval")
    assert [row.captions for row in rows] == [(), ("nan 是什么",)]
    assert rows[0].problem.startswith("caption is nan, which is a missing value") and rows[1].problem == ""
