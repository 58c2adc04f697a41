"""Training of a BERT vocabulary, building of entity prompts, and one-line errors."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from data_prep import entity_prompts, rows, word_pieces
from ymplug_jax.data import text
from ymplug_jax.tasks.alpro.prompter import read_prompts

TITLES = ["红色的猫在跳舞 VLOG", "一只猫和一只狗", "猫咪日常 vlog2", "教你做饭"]


def titles(path: Path) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("video_id:FILE", "title"), *((f"{i}.mp4", t) for i, t in enumerate(TITLES))])
    return path


def command(module: str, *flags: str | Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"data_prep.{module}", *map(str, flags)], text=True, capture_output=True, timeout=120
    )
    assert done.returncode == code, done.stderr
    return done.stdout if not code else done.stderr


def test_a_vocabulary_knows_the_characters(tmp_path: Path) -> None:
    command("word_pieces", "--csv", titles(tmp_path / "p.csv"), "--out", tmp_path / "vocab.txt", "--vocab", "200")
    tokens = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and len(set(tokens)) == len(tokens)
    known = text.load_tokenizer(str(tmp_path / "vocab.txt"))
    for title in TITLES:
        ids = known.encode(title)
        assert known.unk not in ids and known.decode(ids).replace(" ", "") == title.lower().replace(" ", "")
    assert known.mask == 4 and len(known.encode("红色的猫")) == 4
    small = word_pieces.train(iter(TITLES), 12)
    assert len(small) == 12
    with pytest.raises(ValueError, match="--vocab 5"):
        word_pieces.train(iter(TITLES), 5)
    with pytest.raises(ValueError, match="no text"):
        word_pieces.train(iter([]), 20)
    error = command("word_pieces", "--csv", tmp_path / "p.csv", "--out", tmp_path / "v.model", code=2)
    assert "give a name that ends in .txt" in error and "Traceback" not in error


def test_entities_are_counted_and_templates_written(tmp_path: Path) -> None:
    (tmp_path / "nouns.txt").write_text("狗 900\n猫咪 3\n鱼\n\n猫 100\n猫 100\nvlog\n", encoding="utf-8")
    out = command(
        "entity_prompts", "--entities", tmp_path / "nouns.txt", "--csv", titles(tmp_path / "p.csv"), "--out",
        tmp_path / "prompts.json", "--count", "4",
    )  # fmt: skip
    made = json.loads((tmp_path / "prompts.json").read_text(encoding="utf-8"))
    assert made["entities"] == ["猫", "狗", "猫咪", "vlog"] and made["counts"] == [3, 1, 1, 1]
    assert "config.model.entities=4" in out and len(made["templates"]) == len(set(made["templates"])) == 12
    _, prompts = read_prompts(str(tmp_path / "prompts.json"))
    assert len(prompts) == 48 and prompts[:2] == ["一段猫的视频", "一段狗的视频"] and prompts[4] == "一个猫的视频"
    assert "A portrait of the {}." in entity_prompts.TEMPLATES["en"] and len(entity_prompts.TEMPLATES["en"]) == 12
    command(
        "entity_prompts", "--entities", tmp_path / "nouns.txt", "--out", tmp_path / "images.json", "--count", "4", "--images",
        "--language", "en",
    )  # fmt: skip
    names, prompts = read_prompts(str(tmp_path / "images.json"))
    assert (
        len(prompts) == 12 * len(names)
        and prompts[0] == "A photo of a 狗."
        and not set(prompts) & set(made["templates"])
    )
    assert len(set(entity_prompts.IMAGE_TEMPLATES["zh"])) == len(set(entity_prompts.IMAGE_TEMPLATES["en"])) == 12
    assert entity_prompts.choose(["甲", "乙"], Counter({"乙": 1}), 1) == ["乙"]
    (tmp_path / "none.txt").write_text("\n", encoding="utf-8")
    error = command("entity_prompts", "--entities", tmp_path / "none.txt", "--out", tmp_path / "x.json", code=2)
    assert "no entity in it" in error and "Traceback" not in error
    (tmp_path / "none.txt").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"not a file of entity prompts"):
        read_prompts(str(tmp_path / "none.txt"))


def test_questions_become_rows(tmp_path: Path) -> None:
    with open(tmp_path / "q.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("video_id:FILE", "question", "answer"), ("a.mp4", "谁在跳舞", "猫")])
    (row,) = rows.read_rows(tmp_path / "q.csv", "question")
    assert (row.title, row.label_text, row.label_index, row.problem) == ("谁在跳舞", "猫", -1, "")
