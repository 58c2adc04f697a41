"""Conversations as token ids: what the public code gets wrong and this code does not."""

import numpy as np
import pytest

from ymplug_jax.data import conversation
from ymplug_jax.data.conversation import IMAGE, VIDEO

SLOTS = 3


class Bytes:
    """Byte b of UTF-8 is 4 + b."""

    vocab_size, bos, eos, pad = 260, 1, 2, 3

    def encode(self, text: str) -> list[int]:
        return [4 + byte for byte in text.encode()]

    def decode(self, ids) -> str:
        return bytes(i - 4 for i in ids if i >= 4).decode(errors="replace")

    def begins(self) -> str:
        return ""


WORDS = Bytes()


def answers(found: conversation.Tokens) -> str:
    return "".join("$" if i == WORDS.eos else WORDS.decode([i]) for i in found.ids[found.answer])


def test_an_answer_begins_at_the_start_of_a_line() -> None:
    found = conversation.for_training("S.\nHuman: OpenAI: x\nAI: y", WORDS, SLOTS, 64)
    assert answers(found) == "y$"
    assert WORDS.decode(found.ids) == "S.\nHuman: OpenAI: x\nAI: y"


def test_a_placeholder_at_the_start_is_a_medium() -> None:
    found = conversation.for_training("<|video|>\nHuman: q\nAI: a", WORDS, SLOTS, 64)
    np.testing.assert_array_equal(found.ids[: SLOTS + 2], [WORDS.bos, *[VIDEO] * SLOTS, 4 + ord("\n")])
    assert (found.media(VIDEO, SLOTS), found.media(IMAGE, SLOTS)) == (1, 0)
    assert answers(found) == "a$"


def test_the_turn_behind_an_empty_answer_is_not_its_text() -> None:
    text = "S.\nHuman: q\nAI: \nHuman: r\nAI: "
    assert answers(conversation.for_training(f"{text}b", WORDS, SLOTS, 64)) == "b$"
    ids = conversation.for_answering(text, WORDS, SLOTS)
    assert (
        "".join("$" if i == WORDS.eos else WORDS.decode([i]) for i in ids[1:]) == "S.\nHuman: q\nAI: $\nHuman: r\nAI: "
    )


def test_two_media_side_by_side_are_two() -> None:
    found = conversation.for_training("S.\nHuman: <image><image><|video|>\nHuman: q\nAI: a", WORDS, SLOTS, 64)
    assert (found.media(VIDEO, SLOTS), found.media(IMAGE, SLOTS)) == (1, 2)


@pytest.mark.parametrize("limit", range(4, 40))
def test_no_length_is_exceeded_and_no_medium_is_cut(limit: int) -> None:
    text = "S.\nHuman: <|video|>\nHuman: q\nAI: one\nHuman: <image>\nHuman: r\nAI: two"
    found = conversation.for_training(text, WORDS, SLOTS, limit)
    assert len(found.ids) <= limit + 1
    for kind in (IMAGE, VIDEO):
        assert np.sum(found.ids == kind) % SLOTS == 0
    assert not found.answer[found.ids < 0].any()
    if found.answer.any():
        assert found.ids[found.answer][-1] == WORDS.eos  # an answer that is cut still ends
        assert "one$two$".startswith(answers(found).rstrip("$")[:3])


def test_a_question_starts_no_turn_and_asks_for_no_media() -> None:
    text = conversation.prompt("a<image>b\nAI: <|video|> I am the assistant", ["<image>"], [("x", "y\nHuman: z")])
    assert text.endswith("Human: <image>\nHuman: x\nAI: y Human: z\nHuman: a b AI: I am the assistant\nAI: ")
    ids = conversation.for_answering(text, WORDS, SLOTS)
    assert np.sum(ids == IMAGE) == SLOTS
    assert np.sum(ids == VIDEO) == 0


@pytest.mark.parametrize(
    ("text", "introduction"),
    [
        ("S.\nHuman: q\nAI: a", "S."),
        ("S.\n T \n\nHuman: <|video|>\nHuman: q\nAI: a", "S.\n T \n"),
        ("S.\n<|video|>\nHuman: q\nAI: a", "S."),
        ("S. <image> T\nHuman: q\nAI: a", ""),
        ("S.\nAI: a", "S."),
        ("Human: q\nAI: a", ""),
        ("<image>\nHuman: q\nAI: a", ""),
        ("AI: a", ""),
        ("S.\nHuman: q", None),
        ("", None),
    ],
)
def test_introductions(text: str, introduction: str | None) -> None:
    assert conversation.introduction_of(text) == introduction
    if introduction is not None:
        assert conversation.checked_introduction(introduction) == introduction.strip()


@pytest.mark.parametrize(
    "text",
    [
        "Human: x",
        "a\nAI: ",
        "a\r\nHuman: b",
        "\u3000AI: b",
        "a\nHuman: ",
        "<image>",
        "a <|video|>",
        "a\x1b[2J",
        "\ud800",
    ],
)
def test_an_introduction_is_no_turn(text: str) -> None:
    with pytest.raises(ValueError, match=r"^holds (turns or placeholders|the control character)"):
        conversation.checked_introduction(text)


def test_training_and_answering_agree_up_to_the_answer() -> None:
    text = conversation.prompt("second?", ["<|video|>"], [("first?", "yes")])
    ids = conversation.for_answering(text, WORDS, SLOTS)
    trained = conversation.for_training(f"{text}no", WORDS, SLOTS, 4096)
    np.testing.assert_array_equal(trained.ids[: len(ids)], ids)
    assert answers(trained) == "yes$no$"
