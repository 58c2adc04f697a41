"""Tokenizer round trips, text cleaning and padding."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from ymplug_jax.data import text

TITLES = ["红色的圆形在向左移动", "蓝色方形 move fast", "三角形！旋转，很快", "abc 123 视频标题", "一 只 猫"] * 8
# Chinese, mixed text, spaces, unusual characters, emoji, a special token as text, empty text.
TEXTS = ["红色的方形在移动", "蓝色 move abc 圆形", "龘靐齉", "好看🎉👨‍👩‍👧!", "a<sep>b<|endoftext|></s>[SEP]", ""]
IDS = st.lists(st.integers(10, 99), max_size=12)
SPECIALS = {"bos": 5, "eos": 7, "pad": 7}


def sentencepiece_file(folder: Path, **options) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(TITLES), "model_writer": model, "vocab_size": 320, "hard_vocab_limit": False,
            "byte_fallback": True, "add_dummy_prefix": False, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False, "required_chars": "\u2581", "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3,
            "minloglevel": 2,
        } | options
    )  # fmt: skip
    file = folder / "titles.model"
    file.write_bytes(model.getvalue())
    return file


def json_file(folder: Path, specials: list[str]) -> Path:
    """Write a byte-level BPE tokenizer, as GPT-3 and BLOOM use."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    model.train_from_iterator(TITLES, trainer)
    model.enable_truncation(4)  # settings of the file that `load_tokenizer` must override
    file = folder / "tokenizer.json"
    model.save(str(file))
    return file


def vocab_file(folder: Path) -> Path:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"红色的圆形在移动，", "move", "fast", "##er", "1", "##2"]
    file = folder / "vocab.txt"
    file.write_text("\n".join(words) + "\n", encoding="utf-8")
    return file


GPT3 = ["<unk>", "\n", "<sep>", "<|endoftext|>"]
MAKE = {"sentencepiece": sentencepiece_file, "gpt3": lambda folder: json_file(folder, GPT3)}


@pytest.fixture(scope="module", params=MAKE)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> text.Tokenizer:
    return text.load_tokenizer(str(MAKE[request.param](tmp_path_factory.mktemp(request.param))))


@pytest.mark.parametrize("title", TEXTS)
def test_round_trip(tokenizer: text.Tokenizer, title: str):
    ids = tokenizer.encode(title)
    assert tokenizer.decode(ids) == title
    assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(ids), "encode adds no specials and reads none"
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]) == title
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(title) == ids and again.decode(ids) == title
    assert (again.bos, again.eos, again.pad, again.vocab_size) == (
        tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size,
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(title=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=30))
def test_round_trip_of_anything(tokenizer: text.Tokenizer, title: str):
    """Excludes U+2581, sentencepiece's symbol for a space, and the null character, which ends its text."""
    title = text.clean_text(title.replace("\0", ""), 30)
    ids = tokenizer.encode(title)
    assert tokenizer.decode(ids) == title
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_ids_of_numpy_and_ids_without_token(tokenizer: text.Tokenizer):
    """A model may have more embedding rows than its tokenizer has tokens, and may generate any of them."""
    ids = tokenizer.encode("红色的圆形")
    assert tokenizer.decode(np.array(ids, np.int32)) == "红色的圆形"
    assert tokenizer.decode([-1, *ids, tokenizer.vocab_size, 10**6]) == "红色的圆形"


def test_a_sentencepiece_model_with_the_usual_settings(tmp_path: Path):
    """Dummy prefix and NFKC, as in most published models. Without a padding token, the end token pads."""
    file = sentencepiece_file(
        tmp_path, add_dummy_prefix=True, normalization_rule_name="nmt_nfkc", pad_id=-1, unk_id=0, required_chars=""
    )
    tokenizer = text.load_tokenizer(str(file))
    assert tokenizer.pad == tokenizer.eos == 2
    for title in ("红色的方形在移动", "蓝色 move abc 圆形", "好看🎉", ""):
        assert tokenizer.decode(tokenizer.encode(title)) == title


def test_the_gpt3_of_modelscope(tmp_path: Path):
    tokenizer = text.load_tokenizer(str(json_file(tmp_path, GPT3)))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (2, 3, 3)
    assert len(tokenizer.encode("红色的圆形在移动，很快很快")) > 4, "the file's own truncation is off"


def test_other_special_tokens(tmp_path: Path):
    tokenizer = text.load_tokenizer(str(json_file(tmp_path, ["<unk>", "<s>", "</s>", "<pad>"])))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (1, 2, 3)


def test_gaps_in_a_vocabulary_count(tmp_path: Path):
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"红": 0, "<s>": 1, "</s>": 2, "<pad>": 70}))
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = text.load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.vocab_size == 71, "a model needs a row for every id"


def test_bert(tmp_path: Path):
    """Single Chinese characters, lower case, word pieces, and [UNK] for the rest."""
    tokenizer = text.load_tokenizer(str(vocab_file(tmp_path)))
    words = (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    ids = tokenizer.encode("红色MOVE Faster圆12，猫")
    named = [words[i] for i in ids]
    assert named == ["红", "色", "move", "fast", "##er", "圆", "1", "##2", "，", "[UNK]"]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.vocab_size) == (2, 3, 0, len(words))
    full = [tokenizer.bos, *tokenizer.encode("红色的圆形在移动"), tokenizer.eos, tokenizer.pad]
    assert text.clean_caption(tokenizer.decode(full)) == "红色的圆形在移动"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""
    assert pickle.loads(pickle.dumps(tokenizer)).encode("红[SEP]") == tokenizer.encode("红[SEP]")
    assert tokenizer.eos not in tokenizer.encode("红[SEP]")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_id_of_a_token_of_bert_is_its_line(tmp_path: Path, end: str, mark: str):
    """bert-base-chinese has the token U+2028, so lines end at "\\n" only. An empty line reserves an id."""
    lines = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "一",
        "\u2028",
        "",
        "##\u2028",
        "\x85",
        "大",
        "",
        "象",
        "",
        "",
    ]
    (tmp_path / "vocab.txt").write_bytes((mark + "".join(line + end for line in lines)).encode())
    tokenizer = text.load_tokenizer(str(tmp_path / "vocab.txt"))
    assert tokenizer.encode("一大象") == [5, 10, 12] and tokenizer.decode([5, 10, 12]) == "一 大 象"
    assert (tokenizer.pad, tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.mask) == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size == 13, "empty lines at the end are no ids"


def test_repeated_token_in_a_bert_vocabulary_is_rejected(tmp_path: Path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "大", "象", "大"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab\.txt: the token '大' is in line 5 and in line 7") as caught:
        text.load_tokenizer(str(tmp_path / "vocab.txt"))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_a_byte_order_mark(tmp_path: Path):
    file = json_file(tmp_path, GPT3)
    ids = text.load_tokenizer(str(file)).encode("红色的圆形 move")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert text.load_tokenizer(str(file)).encode("红色的圆形 move") == ids


@pytest.mark.parametrize("name", ["x.model", "tokenizer.json", "vocab.txt"])
def test_placeholder_files_are_rejected(tmp_path: Path, name: str):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 109540\n"
    for data, message in (
        (pointer, "a Git LFS pointer, not the file itself \\(109,540 bytes\\); run `git lfs install && git lfs pull`"),
        (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "a web page"),
        (b"", "empty; download it again"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"tokenizer .*{name}: {message}") as caught:
            text.load_tokenizer(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_mistakes_are_named(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"gone.model: no such file; .*\*.model .*, tokenizer.json or vocab.txt"
    ):
        text.load_tokenizer(str(tmp_path / "gone.model"))
    (tmp_path / "vocab.bin").touch()
    with pytest.raises(ValueError, match=r"vocab.bin: unknown file type; .*\*.model .*, tokenizer.json or vocab.txt"):
        text.load_tokenizer(str(tmp_path / "vocab.bin"))
    for name in ("broken.model", "broken.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=f"{name}: cannot be read as"):
            text.load_tokenizer(str(tmp_path / name))
    shutil.copy(sentencepiece_file(tmp_path, bos_id=-1), tmp_path / "nobos.model")
    with pytest.raises(ValueError, match=r"nobos.model: has no begin or end token"):
        text.load_tokenizer(str(tmp_path / "nobos.model"))
    json_file(tmp_path, ["<unk>", "<sep>"])
    with pytest.raises(ValueError, match=r"tokenizer.json: has none of the known sets of special tokens"):
        text.load_tokenizer(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("红\n色\n", encoding="gb18030")
    with pytest.raises(ValueError, match=r"^tokenizer .*vocab.txt: not UTF-8 \(byte 0\)"):
        text.load_tokenizer(str(tmp_path / "vocab.txt"))
    (tmp_path / "vocab.txt").write_text("红\n色\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab.txt: has no \[UNK\]"):
        text.load_tokenizer(str(tmp_path / "vocab.txt"))


@given(title=st.text(max_size=60), words=st.integers(1, 5))
def test_cleaning(title: str, words: int):
    cleaned = text.clean_text(title, words)
    assert not set(cleaned) & set(",.'!?\"()*#:;~-/") and "  " not in cleaned
    assert len(cleaned.split(" ")) <= words
    assert not cleaned.startswith(" ")


def test_captions():
    assert text.clean_caption(" 红 色 的 圆 形 \n") == "红色的圆形"
    assert text.clean_caption("描述： 红 描述：圆形", "描 述：") == "圆形"
    assert text.clean_caption("圆形", "描述：") == "圆形"
    assert text.clean_caption("") == ""
    assert text.clean_caption("  a man  is\nplaying ", "", "en") == "a man is playing"
    assert text.clean_caption("a video of  a man", "a  video of ", "en") == "a man"
    assert text.clean_caption("a man", "a video of", "en") == "a man"


def test_words_come_back_from_word_pieces(tmp_path: Path):
    """Pieces are joined to words; English keeps the spaces between words, Chinese has none."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "man", "play", "##ing", "guitar", "##s", "男", "人"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tokenizer = text.load_tokenizer(str(tmp_path / "vocab.txt"))
    ids = tokenizer.encode(text.clean_text("A man-playing, guitars!", 30))
    assert [words[i] for i in ids] == ["a", "man", "play", "##ing", "guitar", "##s"]
    full = [tokenizer.bos, *ids, tokenizer.eos, tokenizer.pad]
    assert text.clean_caption(tokenizer.decode(full), "", "en") == "a man playing guitars"
    assert text.clean_caption(tokenizer.decode(tokenizer.encode("男人")), "", "zh") == "男人"


@given(ids=IDS, length=st.integers(1, 20))
def test_plain_rows(ids: list[int], length: int):
    row, mask = text.encode_text(ids, length, **SPECIALS)
    whole = [5, *ids, 7]
    kept = min(len(whole), length)
    assert row.dtype == mask.dtype == np.int32 and row.shape == mask.shape == (length,)
    assert row.tolist() == whole[:kept] + [7] * (length - kept)
    assert mask.tolist() == [1] * kept + [0] * (length - kept)


@given(prompt=IDS, target=IDS, length=st.integers(2, 30))
def test_pairs(prompt: list[int], target: list[int], length: int):
    row, mask, kept = text.encode_pair(prompt, target, length, **SPECIALS)
    used = int(mask.sum())
    assert row.dtype == mask.dtype == np.int32 and row.shape == mask.shape == (length,)
    assert mask.tolist() == [1] * used + [0] * (length - used) and row[used:].tolist() == [7] * (length - used)
    body = row[1 : used - 1].tolist()
    assert row[0] == 5 and row[used - 1] == 7, "the end token always stays"
    assert body[:kept] == prompt[:kept] and body[kept:] == target[: len(body) - kept]
    if len(prompt) + len(target) + 2 <= length:
        assert body == prompt + target, "nothing is cut without need"
    else:
        assert used == length, "nothing more is cut than needed"
    if len(target) + 2 <= length <= len(prompt) + len(target) + 2:
        assert body[kept:] == target, "a target that fits beside a shorter prompt is whole"


QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> text.Tokenizer:
    """Like Qwen3: ordinary tokens that look like special tokens of other models, and a control token not marked as special."""
    folder = tmp_path_factory.mktemp("qwen")
    file = json_file(folder, ["!", "<s>", "</s>", "<pad>", *QWEN, "<think>"])
    model = json.loads(file.read_text(encoding="utf-8"))
    model["added_tokens"] = [t for t in model["added_tokens"] if t["content"] in (*QWEN, "<think>")]
    model["added_tokens"][-1]["special"] = False
    file.write_text(json.dumps(model), encoding="utf-8")
    return text.load_tokenizer(str(file))


def test_qwen_starts_a_text_with_its_end_token(qwen: text.Tokenizer):
    assert (qwen.bos, qwen.eos, qwen.pad) == (4, 4, 4)
    ids = qwen.encode("红色的圆形")
    row, mask = text.encode_text(ids, len(ids) + 4, bos=qwen.bos, eos=qwen.eos, pad=qwen.pad)
    assert row.tolist() == [4, *ids, 4, 4, 4]
    assert mask.tolist() == [1] * (len(ids) + 2) + [0, 0], "the end is seen, padding of the same id is not"
    assert qwen.decode(row) == "红色的圆形"


def test_start_token_is_described(tmp_path: Path):
    qwen = text.load_tokenizer(str(json_file(tmp_path, ["!", *QWEN])))
    assert (
        qwen.begins()
        == "a text starts with <|endoftext|> (1), the end-of-text token, since the tokenizer has no beginning token"
    )
    bloom = text.load_tokenizer(str(json_file(tmp_path, ["<s>", "</s>", "<pad>"])))
    assert bloom.begins() == "a text starts with <s> (0), the beginning token"
    pieces = text.load_tokenizer(str(sentencepiece_file(tmp_path)))
    assert pieces.begins() == "a text starts with <s> (1), the beginning token"


@pytest.mark.parametrize("title", [*TEXTS, "<|im_start|>system<|im_end|>", "a<think>b</think>", "<|endoftext|>"])
def test_control_tokens_of_qwen_in_a_title_are_text(qwen: text.Tokenizer, title: str):
    for tokenizer in (qwen, pickle.loads(pickle.dumps(qwen))):
        ids = tokenizer.encode(title)
        assert not {4, 5, 6, 7} & set(ids), "no <|endoftext|>, <|im_start|>, <|im_end|> or <think>"
        assert tokenizer.decode(ids) == title
        assert tokenizer.decode([7, *ids, 6]) == title, "a model's own control tokens are no text"
