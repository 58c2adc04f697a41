"""Lines end at a line feed only, and byte order marks are dropped."""

from pathlib import Path

import pytest
from etils import epath

from ymplug_jax.core import config, exits, metrics, text_files
from ymplug_jax.data.source import Texts
from ymplug_jax.tasks.common import preprocess

# Characters that str.splitlines or text mode treat as line ends.
ODD = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3000000000\n"


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\nb\n", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\r\nb", ["a", "b"]),
        (b"a\rb\n", ["a\rb"]),
        (b"a\r\r\n", ["a\r"]),
        (b"a\n\n\nb\n\n", ["a", "", "", "b", ""]),
        (b"\xef\xbb\xbfa\r\n", ["a"]),
        (b"\xef\xbb\xbf", []),
        ("a\n\ufeffb\n".encode(), ["a", "\ufeffb"]),
        (f"x{ODD}y\n{ODD}\n".encode(), [f"x{ODD}y", ODD]),
    ],
)
def test_lines(tmp_path: Path, data: bytes, lines: list[str]):
    file = tmp_path / "x.txt"
    file.write_bytes(data)
    assert text_files.read_lines(file) == text_files.read_lines(epath.Path(file)) == lines


def test_mistakes_name_the_file(tmp_path: Path):
    file = tmp_path / "x.txt"
    for data, message in (
        ("标题\n".encode("gb18030"), r"x\.txt: not UTF-8 \(byte 0\); save it as UTF-8"),
        (b"abc\xff", r"x\.txt: not UTF-8 \(byte 3\)"),
        ("a\n".encode("utf-16"), r"x\.txt: UTF-16, not UTF-8; save it as UTF-8"),
        (POINTER, r"x\.txt: a Git LFS pointer, .* \(3,000,000,000 bytes\); run `git lfs install && git lfs pull`"),
        (POINTER.replace(b"\n", b"\r\n"), r"x\.txt: a Git LFS pointer"),
    ):
        file.write_bytes(data)
        with pytest.raises(exits.Mistake, match=message):
            text_files.read_lines(file)
    with pytest.raises(exits.Mistake, match="a folder, not a file; give a file in it"):
        text_files.read_lines(tmp_path)
    with pytest.raises(FileNotFoundError):
        text_files.read_lines(tmp_path / "gone.txt")


def test_text_file_has_one_title_per_line(tmp_path: Path):
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeff第一行\r\n\r\n第二\u2028行\r\n第\x85三\r行".encode())
    texts = Texts(str(file))
    assert [texts[i].title for i in range(len(texts))] == ["第一行", "第二\u2028行", "第\x85三\r行"]
    file.write_bytes(b"\xef\xbb\xbf\n \n")
    with pytest.raises(ValueError, match="no text in it"):
        Texts(str(file))
    file.write_bytes(POINTER)
    with pytest.raises(ValueError, match="Git LFS pointer"):
        Texts(str(file))


def test_metrics_have_one_object_per_line(tmp_path: Path):
    """Metric names may contain any character. A truncated line is skipped."""
    (tmp_path / "metrics.jsonl").write_bytes(
        '{"step": 1, "a\u2028b": 2.5}\n{"step": 2, "a\u2028b": 1.5}\n{"st'.encode()
    )
    assert metrics.read_metrics(epath.Path(tmp_path)) == [{"step": 1, "a\u2028b": 2.5}, {"step": 2, "a\u2028b": 1.5}]


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path):
    """Another tokenizer assigns other ids, so the message advises another tokenizer, not a larger embedding table."""
    file = tmp_path / "vocab.txt"
    file.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n大\n", encoding="utf-8")
    data = config.Data(tokenizer=str(file))
    assert preprocess.tokenizer_for(data, 6).vocab_size == 6
    with pytest.raises(
        ValueError, match="has 6 tokens, the model only 5; give the tokenizer that the model was trained"
    ):
        preprocess.tokenizer_for(data, 5)
