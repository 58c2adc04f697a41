"""Conversations in one process: turns, cache, streamed text, limits, interruptions."""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import chats
from answering import draw_videos
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import conversation
from ymplug_jax.data.text import load_tokenizer
from ymplug_jax.inference.chat import Broken, ChatModel
from ymplug_jax.inference.chat_session import Session, Style, style_of
from ymplug_jax.inference.chat_text import Spoken, Turn, transcript
from ymplug_jax.models import decode, decode_stream
from ymplug_jax.models.decode_sampling import Rules
from ymplug_jax.models.decode_stream import Stream

LENGTH = 288  # of the prompts that are read at once


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip, two images and a tokenizer."""
    home = tmp_path_factory.mktemp("files")
    draw_videos(home, "a.mp4")
    chats.picture(home / "b.png", 200)
    chats.picture(home / "c.png", 90)
    chats.tokenizer(home / "tokenizer.json")
    return home


def model_of(name: str, vocabulary: Path, *, whole_lines: bool = False, **data: object) -> ChatModel:
    """A chat model with random weights, without a checkpoint."""
    made = chats.experiment(chats.LMS[name], vocabulary)
    run, params = chats.run_of(made)
    predictor = SimpleNamespace(
        folder=Path("run"),
        whole_lines=whole_lines,
        introduction=conversation.SYSTEM,
        experiment=made,
        params=lambda: params,
        tracing=run.tracing,
    )
    return ChatModel(predictor)


@pytest.fixture(scope="module")
def opened(files: Path) -> Iterator[ChatModel]:
    with contextlib.closing(model_of("bloom", files / "tokenizer.json")) as model:
        yield model


def at_once(model: ChatModel, rules: Rules, new: int):
    """A function that reads a whole transcript at once, without a stream: (ids, vectors of media, key) -> ids of the answer."""
    llm, eos = model.model.llm, model.tokenizer.eos

    @jax.jit
    def run(
        params: dict, ids: jax.Array, media: jax.Array, index: jax.Array, mask: jax.Array, key: jax.Array
    ) -> jax.Array:
        embeds = llm.apply({"params": params}, ids, method="embed")
        embeds = jax.numpy.where((index >= 0)[..., None], media[jax.numpy.maximum(index, 0)], embeds)
        return decode.generate(llm, params, embeds, mask, rules, key, new_tokens=new, eos=eos).ids

    def answer(ids: list[int], media: list, key: jax.Array) -> list[int]:
        row, index, mask = (
            np.zeros((1, LENGTH), np.int32),
            np.full((1, LENGTH), -1, np.int32),
            np.zeros((1, LENGTH), bool),
        )
        row[0, -len(ids) :], mask[0, -len(ids) :] = np.maximum(ids, 0), True
        slots = np.flatnonzero(np.array(ids) < 0)
        index[0, slots + LENGTH - len(ids)] = np.arange(len(slots))
        vectors = np.zeros((12, llm.width), np.float32)
        found = np.concatenate([np.asarray(medium.slots[0]) for medium in media])
        assert len(found) == len(slots)
        vectors[: len(found)] = found
        said = run(model._predictor.params()["llm"], row, vectors, index, mask, key)[0].tolist()
        return said[: said.index(eos)] if eos in said else said

    return answer


@pytest.mark.parametrize("name", chats.LMS)
def test_turns_equal_one_prefill_of_the_whole_transcript(
    name: str, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clip at the start and an image before the second turn. A turn reads its own tokens only, and few programs are compiled."""
    read, traced = [], []
    read_text, read_chunk, step = ChatModel.read_text, decode_stream.read, decode_stream.step

    def reads(self: ChatModel, stream: Stream, at: int, ids: list[int]) -> Stream:
        read.extend(ids)
        return read_text(self, stream, at, ids)

    monkeypatch.setattr(ChatModel, "read_text", reads)
    monkeypatch.setattr(decode_stream, "read", lambda *given: (traced.append(given[4].shape), read_chunk(*given))[1])
    monkeypatch.setattr(decode_stream, "step", lambda *given: (traced.append("step"), step(*given))[1])
    style = Style(Rules(temperature=0.8, top_k=40, repetition_penalty=1.2), new_tokens=6, seed=3)
    with contextlib.closing(model_of(name, files / "tokenizer.json")) as model:
        whole = at_once(model, style.rules, style.new_tokens)
        session = Session(model, style)
        session.show([str(files / "a.mp4")])
        before: list[int] = []
        for number, question in enumerate(("视频里有什么？", "它是什么颜色的？再说", "再说一次")):
            if number == 1:
                session.show(image=[str(files / "b.png")])
            read.clear()
            answer = session.ask(question)
            assert "".join(answer) == answer.text and answer.ended in ("length", "end")
            *asked, said = split(session, before)
            key = jax.random.fold_in(jax.random.key(3), number)
            assert whole([*before, *asked[0]], session.media, key) == said
            # The end token behind an answer is read with the next question.
            assert read == before[-1:] + [token for token in asked[0] if token >= 0]
            before = session._ids
    slots, width = model.model.abstractor.slots, model.model.llm.width
    assert sorted(map(str, traced)) == sorted(
        map(str, [(1, 32, width), (1, 256, width), (1, slots, width), "step", (1, 1, width)])
    )


def split(session: Session, before: list[int]) -> tuple[list[int], list[int]]:
    """Ids of the last question and of its answer; the answer stands behind the last "AI: "."""
    ids, ai = session._ids[len(before) :], session.model.tokenizer.encode(conversation.AI)
    begin = max(i for i in range(len(ids)) if ids[i : i + len(ai)] == ai) + len(ai)
    assert ids[-1] == session.model.tokenizer.eos
    return ids[:begin], ids[begin:-1]


def test_whole_lines_are_tokenised_anew_and_read_from_the_first_difference(files: Path) -> None:
    with contextlib.closing(model_of("bloom", files / "tokenizer.json", whole_lines=True)) as model:
        session = Session(model, Style(new_tokens=5))
        session.show([str(files / "a.mp4")])
        first = session.ask("视频里有什么？").whole()
        session.ask("再说一次").whole()
        text = conversation.prompt("再说一次", history=[("视频里有什么？", first)])
        ids = conversation.for_answering(text, model.tokenizer, model.model.abstractor.slots, piecewise=False)
        assert session._ids[: len(ids)] == ids.tolist()
        key = jax.random.key(0)
        said = session._ids[len(ids) : -1]
        assert at_once(model, Rules(), 5)(ids.tolist(), session.media, key) == said


def test_an_answer_that_is_left_keeps_what_was_said(opened: ChatModel) -> None:
    session = Session(opened, Style(new_tokens=8))
    answer = session.ask("说")
    first = next(answer)
    assert len(opened.tokenizer.decode(session._read)) and not session.turns  # the first piece came before the end
    again = session.ask("再说")
    assert answer.ended == "stopped" and session.turns[0].answer == answer.text and answer.text.startswith(first)
    assert again.whole() is not None and len(session.turns) == 2
    whole = Session(opened, Style(new_tokens=8)).ask("说")
    assert whole.whole().startswith(first) and whole.ended in ("length", "end")


def test_an_interrupted_program_loses_no_turn(opened: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a program runs that uses the cache up: the cache is filled again."""
    session, plain = Session(opened, Style(new_tokens=4)), Session(opened, Style(new_tokens=4))
    for one in (session, plain):
        one.ask("说").whole()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(opened, "_read_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.ask("再说").whole()
    assert len(session.turns) == 1
    assert session.ask("再说").whole() == plain.ask("再说").whole()


def test_limits_have_messages(opened: ChatModel, files: Path) -> None:
    asked = len(Session(opened)._ids_with(Turn((), "一" * 8)))
    limit = asked + 20
    session = Session(opened, Style(new_tokens=50), context=limit)
    answer = session.ask("一" * 8)
    answer.whole()
    assert answer.ended == "context" and session.tokens == limit + 1  # and the end token, which is not read
    with pytest.raises(
        Mistake, match=rf"^question: the conversation would have \d+ tokens and holds {limit} with the answer"
    ):
        session.ask("再说")
    assert len(session.turns) == 1
    with pytest.raises(Mistake, match=r"^question: nothing is left of it"):
        session.ask(" <image> ")
    with pytest.raises(Mistake, match=r"none.mp4: missing_file: no such file"):
        session.show([str(files / "none.mp4")])
    with pytest.raises(Mistake, match=r"^context 3: too small"):
        Session(opened, context=3)
    few = SimpleNamespace(checked_context=lambda _: 99, model=SimpleNamespace(llm=SimpleNamespace(vocab=100)))
    with pytest.raises(Mistake, match=r"^beams 64: too many for 100 tokens"):
        Session(few, Style(beams=64))


def test_weights_that_are_not_finite_are_reported(opened: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = jax.tree.map(lambda leaf: leaf * np.nan, opened._predictor.params())
    monkeypatch.setattr(opened._predictor, "params", lambda: broken)
    for style in (Style(new_tokens=8), Style(new_tokens=8, beams=2)):
        with pytest.raises(Broken, match=r"^run: the model's scores are not finite"):
            Session(opened, style).ask("说").whole()


def test_beams_give_the_answer_as_one_piece(opened: ChatModel) -> None:
    session = Session(opened, Style(new_tokens=8, beams=2))
    answer = session.ask("说")
    assert len(list(answer)) <= 8 and session.ask("再说").whole() is not None and len(session.turns) == 2


def test_files_are_encoded_once(opened: ChatModel, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, encoded = Session(opened), []
    slots = ChatModel._slots
    monkeypatch.setattr(ChatModel, "_slots", lambda *given: (encoded.append(given[1]), slots(*given))[1])
    for _ in range(2):
        session.show([str(files / "a.mp4")], [str(files / "c.png")])
    assert encoded == [str(files / "a.mp4"), str(files / "c.png")]
    picture = files / "changed.png"
    chats.picture(picture, 30)
    first = opened.medium(picture, still=True)
    chats.picture(picture, 250)
    assert not np.array_equal(first.slots, opened.medium(picture, still=True).slots)


def test_transcripts_are_prompts() -> None:
    turns = [Turn(("<|video|>", "<image>"), "这是\n什么 <image>？", "一只\n猫。"), Turn((), "什么颜色？")]
    text = conversation.prompt(turns[1].question, turns[0].media, [(turns[0].question, turns[0].answer)])
    assert transcript(turns) == text
    later = transcript([turns[0], Turn(("<image>",), "这个呢？")])
    assert later.endswith("\nAI: 一只 猫。\nHuman: <image>\nHuman: 这个呢？\nAI: ")


@pytest.mark.parametrize("introduction", ["", "看一看，答一答。", "两\n行"])
def test_a_conversation_begins_with_its_introduction(opened: ChatModel, introduction: str) -> None:
    """As the records of its training do; a change is read anew although the rest of the text is the same."""
    session, slots = Session(opened, Style(new_tokens=3)), opened.model.abstractor.slots
    session.ask("说").whole()
    session.reset(f" {introduction}\r\n" if introduction else "")
    assert session.ask("说").whole() is not None and session.transcript()["introduction"] == introduction
    record = "\n".join([*([introduction] if introduction else []), "Human: 说\nAI: 好"])
    assert conversation.introduction_of(record) == introduction
    trained = conversation.for_training(record, opened.tokenizer, slots, 99)
    count = int(np.argmax(trained.answer))
    assert session._ids[:count] == session._read[:count] == trained.ids[:count].tolist()
    alone = Session(opened, Style(new_tokens=3), introduction=introduction)
    assert alone.ask("说").whole() == session.turns[0].answer
    alone.reset()
    assert alone.introduction == introduction
    session.reset()
    assert session.introduction == conversation.SYSTEM


def test_a_turn_after_a_turn_has_the_tokens_of_the_whole_text(opened: ChatModel) -> None:
    """If an answer is tokenised as it would be in training."""
    session, slots = Session(opened), opened.model.abstractor.slots
    session.turns = [Turn((), "视频里有什么？", "一只猫。")]
    first = conversation.for_answering(transcript([Turn((), "视频里有什么？")]), opened.tokenizer, slots)
    session._ids = [*first, *opened.tokenizer.encode("一只猫。"), opened.tokenizer.eos]
    turn = Turn(("<image>",), "颜色？")
    whole = conversation.for_answering(transcript([*session.turns, turn]), opened.tokenizer, slots)
    assert session._ids_with(turn) == whole.tolist()


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_text_comes_in_whole_characters(kind: str, files: Path, tmp_path: Path) -> None:
    if kind == "bytes":
        tokenizer = load_tokenizer(str(files / "tokenizer.json"))
    else:
        import shards

        tokenizer = load_tokenizer(str(shards.tokenizer(tmp_path / "t.model")))
    for text in ("视频里有一只狗🐕🐈，红色的圆形。", "第 3 个视频 0 9"):
        spoken, ids = Spoken(tokenizer.decode), tokenizer.encode(text)
        pieces = [spoken.add(token) for token in ids]
        assert "".join([*pieces, spoken.end()]) == tokenizer.decode(ids)
        if kind == "bytes":
            assert len(ids) > len(text) and "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
            cut = Spoken(tokenizer.decode)
            assert [cut.add(token) for token in tokenizer.encode("🐕")[:2]] == ["", ""] and cut.end() != ""
    rng = np.random.default_rng(0)
    for _ in range(20):
        spoken, ids = Spoken(tokenizer.decode), rng.integers(4, min(tokenizer.vocab_size, 260), 30).tolist()
        assert "".join([*map(spoken.add, ids), spoken.end()]) == tokenizer.decode(ids)


def test_values_out_of_range_are_mistakes() -> None:
    refused = partial(pytest.raises, Mistake)
    for rules, more, message in (
        ({"top_p": 1.5}, {}, r"^top_p: 1.5 is out of range; give more than 0 and at most 1"),
        ({"top_k": 2.5}, {}, "^top_k=2.5: not a whole number"),
        ({"heat": 1}, {}, "^heat: unknown; give some of repetition_penalty"),
        ({"top_k": 5, "temperature": 0}, {}, "^top_k: has no effect with temperature 0"),
        ({"temperature": 1.0}, {"beams": 2}, "^temperature: a search with beams draws nothing"),
        ({}, {"beams": 0}, "^beams=0: out of range; give a whole number from 1 to 64"),
        ({}, {"seed": -1}, "^seed=-1: out of range"),
        ({}, {"new_tokens": 0}, "^new_tokens=0: out of range"),
    ):
        with refused(match=message):
            style_of(rules, **more)
    assert style_of({"top_k": 5}).rules == Rules(temperature=1.0, top_k=5)
    assert style_of({"top_k": 0, "top_p": 1.0}).rules == Rules()
