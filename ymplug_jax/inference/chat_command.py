"""`ymplug_jax.predict chat`: questions of the command line, of a terminal or of stdin, and files of questions."""

import argparse
import sys
from collections.abc import Iterator

from ymplug_jax.core.exits import Mistake
from ymplug_jax.inference import chat_questions
from ymplug_jax.inference.chat import ChatModel
from ymplug_jax.inference.chat_session import Session, Style
from ymplug_jax.inference.chat_terminal import Terminal, say_error, tell


def run(args: argparse.Namespace, style: Style, model: ChatModel) -> int:
    """Answer; returns the exit code.

    Args:
      args: of `predict_flags.check_chat`.
      style: how answers are generated.
      model: of the checkpoint.

    Raises:
      Mistake: a file of the command line cannot be read, or a question of it does not fit.
      PlaceFailed: a disk or the decoding process failed.
      Closed: nobody reads stdout any more.
    """
    if args.questions:
        return chat_questions.answer_all(args, style, model)
    session = Session(model, style, context=args.context, introduction=args.introduction)
    session.show(args.video, args.image or [])
    if args.question:
        for question in args.question:
            tell(session, question, as_json=args.json)
        return 0
    if sys.stdin.isatty():
        return Terminal(session, as_json=args.json).talk()
    return _piped(session, args.json)


def _piped(session: Session, as_json: bool) -> int:
    """Answer the lines of stdin; commands are those of the terminal. Errors are printed and counted."""
    terminal, failed = Terminal(session, as_json=as_json), False
    for line in _lines():
        try:
            if not terminal.take(line):
                break
        except Mistake as error:
            say_error(error)
            failed = True
    return int(failed)


def _lines() -> Iterator[str]:
    """Lines of stdin as UTF-8, whatever the locale says.

    Raises:
      Mistake: a line is not UTF-8.
    """
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise Mistake(f"line {number} of stdin: not UTF-8; convert the questions") from None
