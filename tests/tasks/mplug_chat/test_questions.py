"""The last answer of a conversation, closed sets of answers, black frames and the frames of another clip."""

import cv2
import numpy as np
import pytest

import shards
from conversations import Held, clip, record, record_of
from ymplug_jax.data.records import CorruptRecord
from ymplug_jax.tasks.mplug_chat import questions
from ymplug_jax.tasks.mplug_chat.questions import Asked, Others, Questions


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("S\nHuman: <|video|>\nHuman: 什么？\nAI: 猫。", Asked("S\nHuman: <|video|>\nHuman: 什么？\nAI: ", "什么？", "猫。")),
        ("Human: a\nAI: b\nHuman: c\nAI: d", Asked("Human: a\nAI: b\nHuman: c\nAI: ", "c", "d")),
        ("Human: a\nAI: b\nHuman: c", Asked("Human: a\nAI: ", "a", "b")),  # a question without an answer at the end
        ("Human: a\nAI: b\nHuman: c\nAI: ", Asked("Human: a\nAI: ", "a", "b")),
        ("Human: a\nAI: b\nHuman: c\nAI:  \n", Asked("Human: a\nAI: ", "a", "b")),
        ("Human: <image> 前 <image> 后\nAI: b <image>", Asked("Human: <image> 前 <image> 后\nAI: ", "前 后", "b")),
        ("Human: OpenAI: x\nAI: y", Asked("Human: OpenAI: x\nAI: ", "OpenAI: x", "y")),
        ("Human: <|video|>\nAI: 一只猫", Asked("Human: <|video|>\nAI: ", "", "一只猫")),
        ("Human: a", None), ("", None), ("AI: ", None), ("Human: a\nAI: <image>", None),
    ],
)  # fmt: skip
def test_last_answer(text: str, found: Asked | None) -> None:
    assert questions.last_answer(text) == found


def test_kind_is_the_task_type_without_its_transform() -> None:
    kinds = [questions.kind_of(name) for name in ("colour_sft", "overall_scene_sft", "colour", "", "_sft")]
    assert kinds == ["colour", "overall_scene", "colour", "other", "_sft"]


def test_questions_without_options_get_the_answers_of_their_kind() -> None:
    rows = [
        record([clip(0)], "q", "红色"),
        record([clip(1)], "q", "红色。"),  # the same answer
        record([clip(2)], "q", "蓝色"),
        record([clip(3)], "q", "一", "number_sft"),
        record([clip(4)], "q", "b", "letter_sft", ["b", "a", "B", "c"]),
        record_of([clip(5)], "Human: a"),
    ]
    found = Questions(Held(rows), 2)
    assert [found[i].options for i in range(6)] == [("红色", "蓝色")] * 3 + [(), ("b", "a", "c"), ()]
    assert [question.given for question in found.questions] == [False] * 4 + [True, False]
    assert Questions(Held(rows), 1)[0].options == () and Questions(Held(rows))[0].options == ()
    assert Questions(Held(rows), 4, lambda text: text != "蓝色")[0].options == ()  # one does not fit: the kind is open
    assert Questions(Held(rows), 4, lambda text: text != "蓝色")[4].options == ("b", "a", "c")


def test_black_frames_are_black_and_keep_everything_else() -> None:
    rows = Held([record([clip(0, 3), clip(1, 1, still=True)], "q", "红色"), record([], "q", "红色")])
    views = questions.views(Questions(rows))
    dark = views["black"][0]
    for frame in dark.frames:
        assert not cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_COLOR).any()
    assert [len(medium.frames) for medium in dark.media] == [3, 1] and len(dark.frames) == 4
    assert (dark.text, dark.media_id, dark.media[1].still) == (rows[0].text, "videos/0.mp4", True)
    assert list(dark.timestamps) == [0, 1, 2, 0]
    assert views["black"][1].frames == [] and views[""][0].frames == rows[0].frames and len(views["black"]) == 2


def test_another_clip_comes_from_the_whole_split_and_never_from_the_question() -> None:
    rows = Held([record([clip(i)], f"q{j}", "红色") for i in range(40) for j in range(3)])
    others = Others(Questions(rows))
    donors = [others.donors(index)[0][0] // 3 for index in range(120)]
    own = [index // 3 for index in range(120)]
    assert all(a != b for a, b in zip(donors, own, strict=True))
    assert sorted(set(donors)) == list(range(40))  # each clip stands in for exactly one
    assert donors[::3] == donors[1::3] == donors[2::3]  # questions about one clip see the same other clip
    assert np.mean([abs(a - b) > 4 for a, b in zip(donors, own, strict=True)]) > 0.6  # far beyond a batch
    again = Others(Questions(rows))
    assert [again.donors(index)[0][0] // 3 for index in range(120)] == donors
    changed = questions.views(Questions(rows))["other"][5]
    assert changed.frames == rows[3 * donors[5]].frames and changed.media[0].name == "videos/1.mp4"


def test_other_media_differ_in_content_and_name_and_keep_their_sort() -> None:
    twin = clip(0, name="videos/copy.mp4")  # the content of clip 0 under another name
    rewritten = clip(7, name="videos/0.mp4")  # another content under the name of clip 0
    image = clip(3, 1, still=True)
    rows = Held([
        record([clip(0)], "q", "a"), record([twin], "q", "a"), record([rewritten], "q", "a"), record([clip(2)], "q", "a"),
        record([image], "q", "a"), record([clip(0), clip(2)], "q", "a"), record([clip(2), clip(2)], "q", "a"), record([], "q", "a"),
    ])  # fmt: skip
    others = Others(Questions(rows))
    first = [others.donors(index) for index in range(8)]
    assert first[0] == [(3, 0)]  # neither the twin nor its namesake
    assert first[1][0][0] in (2, 3) and first[2] == [(3, 0)]
    assert first[4] is None and first[5] is None and first[7] == []  # no second image; no third clip
    assert first[6][0] == first[6][1]  # a clip shown twice is replaced by one clip
    assert questions.views(Questions(rows))["other"][4].frames == rows[4].frames


def test_another_clip_of_a_record_with_several_media_brings_its_own_times() -> None:
    rows = Held([record([clip(0, 2), clip(1, 3)], "q", "a"), record([clip(2, 4), clip(3, 1)], "q", "a")])
    others = Others(Questions(rows))
    changed = others(0, rows[0])
    lengths = [len(medium.frames) for medium in changed.media]
    assert sorted(lengths) == [1, 4] and len(changed.frames) == 5
    assert list(changed.timestamps) == [t for count in lengths for t in range(count)]


def test_a_corrupt_record_is_no_donor() -> None:
    class Broken(Held):
        def __getitem__(self, index):
            if index == 1:
                raise CorruptRecord("record 1")
            return super().__getitem__(index)

    rows = Broken([record([clip(i)], "q", "a") for i in range(3)])
    held = Questions(rows)
    others = Others(held)
    assert [others.donors(i) for i in range(3)] == [[(2, 0)], None, [(0, 0)]]
    with pytest.raises(CorruptRecord):
        held[1]


def test_the_fingerprint_tells_how_frames_are_cut() -> None:
    a, b = shards.jpeg(1), shards.jpeg(2)
    one = questions.fingerprint(clip(0)._replace(frames=[a, b]))
    assert (
        one
        == questions.fingerprint(clip(5)._replace(frames=[a, b]))
        != questions.fingerprint(clip(0)._replace(frames=[a + b]))
    )
    assert one != questions.fingerprint(clip(0, still=True)._replace(frames=[a, b]))
