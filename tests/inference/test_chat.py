"""Conversations in one process: turns, cache, streamed text, limits, interruptions."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import chats
import ymplug_jax
from answering import draw_videos
from ymplug_jax.data import conversation
from ymplug_jax.inference import chat
from ymplug_jax.inference.chat_session import Session, Style
from ymplug_jax.models import decode, decode_stream
from ymplug_jax.models.decode_sampling import Rules


@pytest.fixture(scope="module", params=chats.LMS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[chat.ChatModel]:
    home = tmp_path_factory.mktemp(request.param)
    model = ymplug_jax.load(chats.run_folder(home, chats.LMS[request.param])).chat_model()
    yield model
    model.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip and two images."""
    home = tmp_path_factory.mktemp("files")
    draw_videos(home, "a.mp4")
    chats.picture(home / "b.png", 200)
    chats.picture(home / "c.png", 90)
    return home


def prefilled(
    model: chat.ChatModel, session: Session, ids: list[int], rules: Rules, key: jax.Array, new: int
) -> list[int]:
    """What a whole transcript generates when it is read at once, without a stream."""
    llm, params = model.model.llm, model._predictor.params()["llm"]
    slots = model.model.abstractor.slots
    index = np.full(len(ids), -1, np.int32)
    index[np.array(ids) < 0] = np.arange(sum(token < 0 for token in ids))
    media = np.concatenate([np.asarray(medium.slots[0]) for medium in session.media]) if session.media else None
    assert media is None or len(media) % slots == 0

    @jax.jit
    def run(params: dict) -> jax.Array:
        embeds = llm.apply({"params": params}, np.maximum(ids, 0)[None], method="embed")
        if media is not None:
            embeds = jax.numpy.where((index >= 0)[None, :, None], media[np.maximum(index, 0)][None], embeds)
        mask = np.ones((1, len(ids)), bool)
        return decode.generate(llm, params, embeds, mask, rules, key, new_tokens=new, eos=model.tokenizer.eos).ids

    said = run(params)[0].tolist()
    return said[: said.index(model.tokenizer.eos)] if model.tokenizer.eos in said else said


def test_turns_equal_one_prefill_of_the_whole_transcript(opened: chat.ChatModel, files: Path, monkeypatch) -> None:
    """With a clip at the start, an image before the second turn, and a cache that reads new tokens only."""
    traced: list[int] = []
    counted = decode_stream.read
    read: list[int] = []
    read_text = chat.ChatModel.read_text

    def reads(self: chat.ChatModel, stream: decode_stream.Stream, at: int, ids: list[int]) -> decode_stream.Stream:
        read.append(len(ids))
        return read_text(self, stream, at, ids)

    monkeypatch.setattr(chat.ChatModel, "read_text", reads)
    style = Style(Rules(temperature=0.8, top_k=40, repetition_penalty=1.2), new_tokens=6, seed=3)
    session = Session(opened, style)
    session.show([str(files / "a.mp4")])
    before: list[int] = []
    for number, question in enumerate(("视频里有什么？", "它是什么颜色的？" * 3, "再说一次")):
        if number == 1:
            session.show(image=[str(files / "b.png")])
        read.clear()
        answer = session.ask(question)
        pieces = list(answer)
        assert "".join(pieces) == answer.text and answer.ended in ("length", "end")
        ids = session._ids
        fed = ids[: len(ids) - 1 - len(said)] if (said := said_in(session, before)) else ids[:-1]
        key = jax.random.fold_in(jax.random.key(3), number)
        assert prefilled(opened, session, fed, style.rules, key, 6) == said
        new = len(fed) - len(before) + bool(number)  # the end token behind the answer before was not read yet
        assert sum(read) == new - sum(token < 0 for token in fed[len(before) :])
        before = list(ids)
    assert len(session.turns) == 3 and session.tokens == len(before)
    assert counted and not traced


def said_in(session: Session, before: list[int]) -> list[int]:
    """Ids of the last answer, found behind the last "AI: "."""
    ids = session._ids
    asked = session.model.tokenizer.encode(conversation.AI)
    start = max(i for i in range(len(before), len(ids)) if ids[i : i + len(asked)] == asked) + len(asked)
    return ids[start:-1]
