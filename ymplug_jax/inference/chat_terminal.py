"""A conversation in a terminal: lines are questions, and lines that start with a slash are commands."""

import contextlib
import difflib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ymplug_jax.core.exits import Mistake, PlaceFailed
from ymplug_jax.inference.chat_session import Session
from ymplug_jax.inference.output import say
from ymplug_jax.inference.wording import shown

HELP = """\
/video FILE ...   show videos; the next question is about them as well
/image FILE ...   show images
/reset            forget the conversation and everything shown
/save FILE        write the conversation as JSON; /save! replaces a file
/help             this list
/quit             end; so does Ctrl-D, and Ctrl-C at the prompt
//TEXT            ask a question that starts with a slash
Ctrl-C stops an answer. Anything else is a question."""
PROMPT = "> "
ENDED = {
    "length": "the answer is cut at its largest number of tokens; --new_tokens gives more",
    "context": "the conversation is full; /reset begins a new one, --context gives a larger one",
    "stopped": "stopped",
}  # reasons that are told


def tell(session: Session, question: str, *, as_json: bool = False) -> None:
    """Ask, and print the answer while it is generated, or as one JSON object when it is complete.

    Raises:
      KeyboardInterrupt: Ctrl-C; the session keeps what was said so far.
    """
    answer = session.ask(question)
    if as_json:
        answer.whole()
        found = {"question": question, "answer": answer.text, "ended": answer.ended, "tokens": session.tokens}
        text = json.dumps(found, ensure_ascii=False)
        say(text if _writable(text) else json.dumps(found))
    else:
        begun = False
        try:
            for piece in answer:
                begun = True
                say(printable(piece), end="")
        finally:
            answer.close()
            if begun:
                say("")
    if answer.ended in ENDED:
        _note(ENDED[answer.ended])


def printable(text: str) -> str:
    """The text with control characters escaped, line breaks excepted."""
    return "\n".join(map(shown, text.split("\n")))


def say_error(error: Mistake) -> None:
    """Print a mistake that does not end the program."""
    print("error:", shown(" ".join(str(error).split())), file=sys.stderr, flush=True)


class Terminal:
    """Takes lines for a session."""

    def __init__(self, session: Session, *, as_json: bool = False):
        """Begin; `as_json` prints an object for each answer."""
        self._session, self._json = session, as_json
        self._commands: dict[str, Callable[[str], None]] = {
            "video": lambda names: self._show(names, still=False),
            "image": lambda names: self._show(names, still=True),
            "reset": self._reset,
            "save": lambda name: save(self._session, name, replace=False),
            "save!": lambda name: save(self._session, name, replace=True),
            "help": lambda _: _note(HELP),
        }

    def talk(self) -> int:
        """Read lines from the terminal until its end. Returns 0.

        Raises:
          KeyboardInterrupt: Ctrl-C at the prompt.
        """
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` a line editor and a history
        _note(f"{self._session.model.folder}: ask, or /help")
        while True:
            try:
                line = input(PROMPT)
            except EOFError:
                say("")
                return 0
            except UnicodeDecodeError:
                say_error(Mistake("this line: not in the encoding of the terminal; type it again"))
                continue
            try:
                if not self.take(line):
                    return 0
            except KeyboardInterrupt:
                _note(ENDED["stopped"])
            except Mistake as error:
                say_error(error)

    def take(self, line: str) -> bool:
        """Do what a line says. Returns whether to go on.

        Raises:
          Mistake: a command is unknown, or cannot be done.
          KeyboardInterrupt: Ctrl-C during an answer; the session can go on.
        """
        line = line.strip()
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if name in ("quit", "exit"):
                return False
            if name not in self._commands:
                near = difflib.get_close_matches(name, [*self._commands, "quit"], 1, 0.5)
                raise Mistake(f"/{name}: unknown command; {f'did you mean /{near[0]}?' if near else '/help lists all'}")
            self._commands[name](rest.strip())
        elif line:
            tell(self._session, line[1:] if line.startswith("//") else line, as_json=self._json)
        return True

    def _show(self, names: str, still: bool) -> None:
        what = "image" if still else "video"
        files = _files(names)
        if not files:
            raise Mistake(f"/{what}: no file; give one, such as /{what} a.{'jpg' if still else 'mp4'}")
        self._session.show(*(((), files) if still else (files, ())))
        _note(f"shown: {', '.join(map(shown, files))}")

    def _reset(self, _: str) -> None:
        self._session.reset()
        _note("a new conversation; nothing is shown")


def save(session: Session, name: str, *, replace: bool) -> None:
    """Write the transcript as JSON, whole or not at all.

    Raises:
      Mistake: there is no name or no such folder, or the file exists and may not be replaced.
      PlaceFailed: the disk failed.
    """
    if not name:
        raise Mistake("/save: no file; give one, such as /save talk.json")
    if "\0" in name:
        raise Mistake(f"/save {shown(name)}: no name of a file; give another")
    path = Path(name)
    if not path.parent.is_dir():
        raise Mistake(f"/save {shown(name)}: no such folder {shown(str(path.parent))}; create it first")
    if path.is_dir():
        raise Mistake(f"/save {shown(name)}: a folder, not a file; give a file in it")
    text = json.dumps(session.transcript(), indent=2, ensure_ascii=False) + "\n"
    try:
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=".talk_", delete=False) as file:
            partial = Path(file.name)
            try:
                file.write(text.encode("utf-8", "surrogateescape"))
                file.flush()
                os.fsync(file.fileno())
                if replace:
                    partial.replace(path)
                else:
                    os.link(partial, path)  # fails if the file exists
            finally:
                partial.unlink(missing_ok=True)
    except FileExistsError:
        raise Mistake(f"/save {shown(name)}: the file exists; /save! {shown(name)} replaces it") from None
    except PermissionError:
        raise Mistake(f"/save {shown(name)}: no permission to write there; choose another file") from None
    except OSError as error:
        raise PlaceFailed(
            f"/save {shown(name)}: cannot be written ({error.strerror}); free some space, then save again"
        ) from None
    _note(f"saved: {shown(name)}")


def _files(names: str) -> list[str]:
    """Names of files in a line: the whole line if there is such a file, else words, which may be quoted."""
    if not names or os.path.exists(names):
        return [names] if names else []
    try:
        return shlex.split(names)
    except ValueError:  # an open quotation mark
        return [names]


def _writable(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
