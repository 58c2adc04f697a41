"""Parser of conversations, one JSON object per line, and their checks.

    {"video": ["a.mp4"], "image": [], "text": "Human: <|video|>\\nHuman: 视频里有什么？\\nAI: 一只猫。", "prompt": "", "task_type": "sft"}

See docs/prepare_data.md, "Conversations".
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.tables import not_utf8
from ymplug_jax.data import conversation

LONGEST_LINE = 2**20  # bytes of a row; a longer one is no conversation, and reading it could fill the memory
PLACEHOLDERS = {"image": "<image>", "video": "<|video|>"}  # field -> what stands for one of its files in the text
FIELDS = {"images": "image", "videos": "video", "conversations": "text", "conversation": "text", "messages": "text"}
# Names in angle brackets that other projects use for media: <video>, <|image|>, <img>, <ImageHere>, <image_1>.
FOREIGN = re.compile(
    r"<\|?(?:image|img|picture|photo|video|vid|clip|frame|audio|media)s?(?:here|token|pad)?[_-]?\d*\|?>", re.IGNORECASE
)
UNFIT = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\ud800-\\udfff]")
LIKE_ANSWER = re.compile(r"^\s*(?:AI|Assistant|GPT)\s*[:：]", re.IGNORECASE | re.MULTILINE)
LIKE_QUESTION = re.compile(r"^[ \t]*Human:", re.MULTILINE)  # in an answer: a turn whose delimiter is misspelt

# reject reason -> explanation in the printed summary; further reasons are those of video_container.REASONS
REASONS = {
    "bad_json": "the line is not a JSON object",
    "empty_text": "the conversation is empty",
    "unknown_placeholder": "the text holds a placeholder other than <image> and <|video|>",
    "media_count": "the text has more or fewer placeholders than the row has files",
    "media_in_answer": "a placeholder stands in or behind an answer, not in a question",
    "no_answer": "no line starts with 'AI: ' and goes on with text, or no answer fits into --max_tokens",
    "bad_options": "the options are not two or more different texts, one of them the last answer",
    "too_long": f"the line has more than {LONGEST_LINE:,} bytes",
}


class Talk(NamedTuple):
    """One conversation. A row with a `problem` is rejected with `reason`."""

    number: int  # 0-based
    media_id: str  # the first file, or FILE.jsonl:LINE
    text: str  # the whole conversation, introduction included
    media: tuple[tuple[bool, str], ...]  # (still image, file) in the order of the placeholders
    task_type: str
    options: tuple[str, ...] = ()  # answers to choose from, one of them the last answer
    problem: str = ""
    reason: str = ""


class _Rejected(Exception):
    """The row is rejected: (reason, problem)."""


class _RepeatedKey(ValueError):
    """A JSON object with a key that occurs twice."""


def iter_talks(file: Path) -> Iterator[Talk]:
    """Yield the rows of a file with one JSON object per line, or with one array of them, UTF-8 with or without byte order mark.

    Lines are read one after the other; an array is read as a whole.

    Args:
      file: path; blank lines are skipped.

    Raises:
      ValueError: the file is not UTF-8, has no rows, or begins like an array but is none. The message names file and line.
    """
    with open(file, "rb") as stream:
        head = stream.read(256).removeprefix(b"\xef\xbb\xbf")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file}: a Git LFS pointer, not the file itself; run git lfs pull in its repository")
    number = -1
    for number, (line, row) in enumerate(_array(file) if head.lstrip().startswith(b"[") else _lines(file)):
        yield _talk(number, f"{file.name}:{line}", row)
    if number < 0:
        raise ValueError(f"{file}: no rows; write one JSON object per line")


def read_talks(file: Path) -> list[Talk]:
    """Return all rows of a file as `iter_talks` yields them."""
    return list(iter_talks(file))


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, JSON value or the reason that there is none) of every line that is not blank."""
    number = 0
    with open(file, "rb") as stream:
        while data := stream.readline(LONGEST_LINE + 1):
            number += 1
            if len(data) > LONGEST_LINE:
                while data and not data.endswith(b"\n"):
                    data = stream.readline(LONGEST_LINE)
                yield number, _Rejected("too_long", f"more than {LONGEST_LINE:,} bytes; divide the conversation")
                continue
            try:
                text = data.decode("utf-8").lstrip("\ufeff").strip(" \t\r\n")
            except UnicodeDecodeError:
                raise ValueError(not_utf8(file)) from None
            if text:
                yield number, _parsed(text)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        return _Rejected("bad_json", f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return _Rejected("bad_json", f"not JSON: {error}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises _RepeatedKey if a key is repeated: JSON's own rule, the last one counts, would drop text silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _RepeatedKey(f"a key occurs twice among {', '.join(key for key, _ in pairs)}")
    return found


def _array(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield (place from 1, JSON value) of the items of one array."""
    try:
        items = json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise ValueError(not_utf8(file)) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {error.lineno}: the file begins with [ but is no JSON array ({error.msg} at column {error.colno}); "
            "correct the line, or write one JSON object per line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: the file begins with [ but is no JSON array ({error}); write one JSON object per line"
        ) from None
    yield from enumerate(items, 1)


def _talk(number: int, place: str, row: Any) -> Talk:
    """Check a row. The problem names its line, since many rows may share a file."""
    name, at = place, place.rpartition(":")[2]
    try:
        if isinstance(row, _Rejected):
            raise row
        if not isinstance(row, dict):
            raise _Rejected("bad_json", f"not a JSON object but a {type(row).__name__}")
        for wrong, right in FIELDS.items():
            if wrong in row and right not in row:
                raise _Rejected("bad_row", f"a field {wrong!r}, which is not read; write {right!r}")
        files = {field: _files(row, field) for field in PLACEHOLDERS}
        name = next(iter(files["video"] + files["image"]), place)
        task_type = _string(row, "task_type")
        text = whole_text(_string(row, "text"), _string(row, "prompt"))
        media = _media(text, files)
        options = _options(row, _answers(text)[-1])
        name = media[0][1] if media else place
        return Talk(number, name, text.rstrip(), media, task_type, options)
    except _Rejected as rejected:
        reason, problem = rejected.args
        return Talk(number, name, "", (), "", (), f"line {at}: {problem}", reason)


def _string(row: dict[str, Any], field: str) -> str:
    """A text field with "\\n" as its line end; "" if it is absent or null."""
    value = row.get(field)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _Rejected("bad_row", f"{field} is a {type(value).__name__}, not a string")
    return _clean(field, value)


def _clean(field: str, text: str) -> str:
    text = text.replace("\r\n", "\n")
    _check_characters(field, text, allowed="\n\t")
    return text


def _files(row: dict[str, Any], field: str) -> list[str]:
    """The files of a field: a list of strings, or one string; [] if it is absent or null."""
    value = row.get(field)
    names = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _Rejected("bad_row", f"{field} is not a list of paths")
    for name in names:
        if not name.strip():
            raise _Rejected("bad_row", f"{field} holds an empty path")
        _check_characters(field, name)
    return names


def _check_characters(field: str, text: str, allowed: str = "") -> None:
    """Reject control characters, which have no place in a text and could drive a terminal, and half surrogate pairs."""
    for found in UNFIT.finditer(text):
        if found[0] not in allowed:
            what = "half a surrogate pair" if unicodedata.category(found[0]) == "Cs" else "a control character"
            raise _Rejected("bad_row", f"{field} holds {what} (U+{ord(found[0]):04X})")


def whole_text(text: str, prompt: str) -> str:
    """Put the introduction before a conversation that begins with a turn: `prompt`, or else the fixed one of the model.

    A conversation that begins with any other text has its own introduction, which `prompt` precedes.
    """
    text, prompt = text.lstrip(), prompt.strip()
    if not text.strip():
        raise _Rejected("empty_text", "text is empty")
    if len(conversation.pieces(f"\n{prompt}")) > 1:
        raise _Rejected("bad_row", "prompt holds turns or placeholders; it is the introduction, so move them to text")
    if not prompt and text.startswith((conversation.HUMAN.lstrip(), conversation.AI, *conversation.PLACEHOLDERS)):
        prompt = conversation.SYSTEM
    return f"{prompt}\n{text}" if prompt else text


def _media(text: str, files: dict[str, list[str]]) -> tuple[tuple[bool, str], ...]:
    """(still image, file) of each placeholder of the text, in order."""
    if found := FOREIGN.search(re.sub("|".join(map(re.escape, conversation.PLACEHOLDERS)), "", text)):
        raise _Rejected("unknown_placeholder", f"{found[0]} is no placeholder; write <image> or <|video|>")
    for field, placeholder in PLACEHOLDERS.items():
        if text.count(placeholder) != len(files[field]):
            raise _Rejected(
                "media_count", f"{text.count(placeholder)} {placeholder} in text, {len(files[field])} files in {field}"
            )
    left = {PLACEHOLDERS[field]: iter(names) for field, names in files.items()}
    order = [piece for piece in conversation.pieces(text) if piece in left]
    return tuple((piece == PLACEHOLDERS["image"], next(left[piece])) for piece in order)


def _answers(text: str) -> list[str]:
    """The answers, one or more, each with words and without media."""
    answers: list[str] = []
    inside = False
    for piece in conversation.pieces(text):
        if piece == conversation.AI:
            inside = True
            answers.append("")
        elif piece == conversation.HUMAN:
            inside = False
        elif inside and piece in conversation.PLACEHOLDERS:
            raise _Rejected(
                "media_in_answer", f"{piece} in or behind answer {len(answers)}; put it on a line 'Human: {piece}'"
            )
        elif inside:
            answers[-1] += piece
    if not answers:
        hint = ", though one looks so; write 'AI: ' with its space" if LIKE_ANSWER.search(text) else ""
        raise _Rejected("no_answer", f"no line starts with 'AI: '{hint}")
    if empty := [number for number, answer in enumerate(answers, 1) if not answer.strip()]:
        raise _Rejected("no_answer", f"answer {empty[0]} of {len(answers)} is empty")
    if odd := [number for number, answer in enumerate(answers, 1) if LIKE_QUESTION.search(answer)]:
        raise _Rejected(
            "bad_row", f"answer {odd[0]} goes on with a line 'Human:'; begin a turn with 'Human: ' and its space"
        )
    return answers


def _options(row: dict[str, Any], answer: str) -> tuple[str, ...]:
    """The answers to choose from, without blanks around them; () if the field is absent or null."""
    value = row.get("options")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
        raise _Rejected("bad_row", "options is not a list of strings")
    options = tuple(_clean("options", option).strip() for option in value)
    if len(set(options)) < max(len(options), 2) or not all(options):
        raise _Rejected("bad_options", "options are not two or more different texts")
    if any(len(conversation.pieces(f"\n{option}")) > 1 for option in options):
        raise _Rejected("bad_options", "an option holds turns or placeholders")
    if answer.strip() not in options:
        raise _Rejected("bad_options", f"the last answer, {answer.strip()[:40]!r}, is not among the options")
    return options
