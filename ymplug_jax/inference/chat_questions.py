"""`ymplug_jax.predict chat --questions`: a file of questions to a file of answers, row by row; an interrupted command continues."""

import argparse
import dataclasses
import fcntl
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ymplug_jax.core import checkpoint_files, progress
from ymplug_jax.core.exits import Mistake, writing
from ymplug_jax.data import conversation
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_path import resolve
from ymplug_jax.inference.chat import Broken, ChatModel
from ymplug_jax.inference.chat_session import Session, Style
from ymplug_jax.inference.wording import shown

LONGEST_LINE = 2**20  # bytes
KEYS = ("video", "image", "question", "prompt")


class Row(NamedTuple):
    """A question of the file."""

    line: int  # from 1
    given: dict[str, Any]  # the whole row; fields that are no keys are copied to the answer
    video: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    question: str = ""
    introduction: str | None = None  # None: that of the command, or else of the run
    problem: str = ""  # why it is rejected: "REASON: DETAIL"


def answer_all(args: argparse.Namespace, style: Style, model: ChatModel) -> int:
    """Answer every row of `args.questions` into `args.out`; returns 1 if some were rejected, else 0.

    The answers of a row depend on its own contents and the style only. `args.out` appears when it is complete; until then the answers
    are in OUT.part, from which the same command continues.

    Raises:
      Mistake: a file cannot be read or written, or OUT.part holds the answers of another command.
      PlaceFailed: a disk failed.
    """
    root, out = args.video_root or Path("."), args.out
    rows = read(args.questions)
    _check_out(out)
    if not root.is_dir():
        raise Mistake(f"--video_root {root}: no such folder; give the folder of the files")
    session = Session(model, style, context=args.context, introduction=args.introduction)
    identity = {
        "checkpoint": str(model.folder), "step": checkpoint_files.latest_step(str(model.folder)), "questions": len(rows), "context": session.context, "introduction": session.introduction, "video_root": str(root.resolve()),
        "style": dataclasses.asdict(style.rules) | {"beams": style.beams, "new_tokens": style.new_tokens, "seed": style.seed},
    }  # fmt: skip
    rejected: Counter[str] = Counter()
    with _Part(out, identity) as part:
        for row, kept in zip(rows, part.lines, strict=False):
            if kept.get("line") != row.line or any(kept.get(key) != row.given.get(key) for key in KEYS):
                raise Mistake(
                    f"{part.path}: answers other questions than {args.questions}; remove it, or give another --out"
                )
        if part.lines:
            print(f"{part.path}: {len(part.lines)} rows are already answered", file=sys.stderr)
        bar: progress.Bar[None] = progress.bar(total=len(rows), desc="answer", unit="row", initial=len(part.lines))
        with bar:
            for row in rows[len(part.lines) :]:
                part.add({"line": row.line, **row.given, **_answered(session, row, root)})
                bar.update(1)
        for line in part.lines:
            if "error" in line:
                rejected[str(line["error"]).partition(":")[0]] += 1
        part.finish()
    counts = "".join(f", {reason}: {count}" for reason, count in sorted(rejected.items()))
    total = sum(rejected.values())
    print(f"{out}: {len(rows)} rows = {len(rows) - total} answers + {total} rejects{counts}", file=sys.stderr)
    return int(bool(total))


def read(file: Path) -> list[Row]:
    """The rows of a file of JSON lines; empty lines are left out.

    Raises:
      Mistake: the file cannot be read, or has no rows.
    """
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise Mistake(f"--questions {file}: cannot be read ({error.strerror}); give a file of JSON lines") from None
    rows = [_row(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise Mistake(f'--questions {file}: no rows; give lines such as {{"video": ["a.mp4"], "question": "..."}}')
    return rows


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys, of which JSON would drop all but the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key occurs twice among {', '.join(key for key, _ in pairs)}; write it once")
    return found


def _row(number: int, line: bytes) -> Row:
    if len(line) > LONGEST_LINE:
        return Row(number, {}, problem=f"too_long: the line has more than {LONGEST_LINE:,} bytes")
    try:
        given = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return Row(number, {}, problem=f"bad_json: {' '.join(str(error).split())}")
    if not isinstance(given, dict):
        return Row(number, {}, problem="bad_json: not a JSON object")
    media = {}
    for key in ("video", "image"):
        names = given.get(key)
        names = [] if names is None else [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) and name.strip() for name in names):
            return Row(number, given, problem=f'bad_row: "{key}" is not a list of file names')
        if f"{key}s" in given:
            return Row(number, given, problem=f'bad_row: a field "{key}s", which is not read; write "{key}"')
        media[key] = tuple(names)
    question = given.get("question")
    if not isinstance(question, str) or not conversation.plain(question):
        return Row(number, given, problem='bad_row: "question" is missing or empty')
    if any("\ud800" <= letter <= "\udfff" for letter in question):
        return Row(number, given, problem='bad_row: "question" holds half a surrogate pair')
    if taken := [key for key in ("line", "answer", "ended", "error") if key in given]:
        return Row(
            number,
            {key: given.get(key) for key in KEYS if key in given},
            problem=f'bad_row: "{taken[0]}" is written by this command',
        )
    introduction = given.get("prompt")
    if introduction is not None and not isinstance(introduction, str):
        return Row(number, given, problem='bad_row: "prompt" is not a text')
    try:
        introduction = conversation.checked_introduction(introduction or "")
    except ValueError as error:
        return Row(number, given, problem=f'bad_row: "prompt" {error}')
    return Row(number, given, media["video"], media["image"], question, introduction or None)


def _answered(session: Session, row: Row, root: Path) -> dict[str, str]:
    """The answer of a row and why it ended, or why the row is rejected."""
    if row.problem:
        return {"error": row.problem}
    try:
        files = [[str(resolve(str(root), name)) for name in names] for names in (row.video, row.image)]
    except Reject as reject:
        return {"error": ": ".join(map(str, reject.args))}
    session.reset(row.introduction)
    try:
        session.show(*files)
        answer = session.ask(row.question)
    except Broken:
        raise
    except Mistake as error:  # a file cannot be decoded, or the row is too long
        return {"error": _reason(str(error), files)}
    answer.whole()
    return {"answer": answer.text, "ended": answer.ended}


def _reason(message: str, files: list[list[str]]) -> str:
    """The message about a row, without the resolved path in front, so that it begins with the reason."""
    for name in (name for names in files for name in names):
        message = message.removeprefix(f"{shown(name)}: ")
    return message.replace("question: ", "too_long: ", 1) if message.startswith("question: ") else message


class _Part:
    """OUT.part: a line that names the command, then the rows so far. Locked while it is open; a half-written last line is cut off."""

    def __init__(self, out: Path, identity: dict[str, Any]):
        self.path, self._out = out.with_name(out.name + ".part"), out
        self.lines: list[dict[str, Any]] = []
        self._identity = identity

    def __enter__(self) -> "_Part":
        with writing(self.path, "--out"):
            self._file: BinaryIO = self.path.open("a+b")
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self.lines:
            self.path.unlink(missing_ok=True)

    def add(self, line: dict[str, Any]) -> None:
        """Append a row.

        Raises:
          PlaceFailed: the disk failed; earlier rows are kept.
        """
        self._write(line)
        self.lines.append(line)

    def finish(self) -> None:
        """Put the rows in their place, without the line that names the command.

        Raises:
          PlaceFailed: the disk failed; OUT.part is kept.
        """
        whole = self.path.with_name(self._out.name + ".whole")
        with writing(self._out, "--out"):
            try:
                with whole.open("wb") as file:
                    file.writelines(_bytes(line) for line in self.lines)
                    file.flush()
                    os.fsync(file.fileno())
                whole.replace(self._out)
            finally:
                whole.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake(f"{self.path}: another process is writing it; wait for it, or give another --out") from None
        except OSError:  # a file system without locks
            pass

    def _read(self) -> None:
        with writing(self.path, "--out"):
            self._file.seek(0)
            content = self._file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._file.truncate(len(whole))
        try:
            found = [dict(json.loads(line)) for line in whole.splitlines()]
        except (ValueError, TypeError):
            raise Mistake(f"{self.path}: not written by this command; remove it, or give another --out") from None
        if not found:
            self._write(self._identity)
        elif found[0] != self._identity:
            odd = next((key for key, value in self._identity.items() if found[0].get(key) != value), "something else")
            raise Mistake(f"{self.path}: begun with another {odd}; remove it to begin again, or give another --out")
        self.lines = found[1:]

    def _write(self, line: dict[str, Any]) -> None:
        with writing(self.path, "--out"):
            self._file.write(_bytes(line))
            self._file.flush()


def _bytes(line: dict[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _check_out(out: Path) -> None:
    if out.exists():
        raise Mistake(f"--out {out}: exists; remove it, or give another file")
    if not out.parent.is_dir():
        raise Mistake(f"--out {out}: no such folder {out.parent}; create it first")
    if not os.access(out.parent, os.W_OK):
        raise Mistake(f"--out {out}: no permission to write there; check its permissions, or choose another file")
