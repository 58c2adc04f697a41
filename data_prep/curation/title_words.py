"""Lists of words for titles: adverts, upload names, a user's blocklist. One word a line; lines that begin with # are comments."""

from pathlib import Path
from typing import NamedTuple

import regex

from data_prep.curation.title_text import clean, one_of, plus_as_word
from data_prep.tables import read_lines

FOLDER = Path(__file__).parent / "words"
_JUNK = r"[^\p{L}\p{N}]"
# An account behind its name: five letters or digits or more behind a colon; otherwise with three digits, or six digits alone.
_ACCOUNT = (
    rf"(?:号码|账号|同号|号|id)?[是为]?(?:{_JUNK}{{0,3}}:{_JUNK}{{0,3}}(?:[a-z][a-z0-9_-]{{4,}}|[0-9]{{5,12}})"
    rf"|{_JUNK}{{0,4}}(?:(?=(?:[a-z_-]*[0-9]){{3}})[a-z][a-z0-9_-]{{4,}}|[1-9][0-9]{{5,11}}))(?![0-9])"
)


class Adverts(NamedTuple):
    """Phrases of adverts: patterns on compact titles, and one of accounts on cleaned titles in lower case."""

    one: "regex.Pattern[str] | None"  # one of these is enough
    two: "regex.Pattern[str] | None"  # two different ones are needed
    accounts: "regex.Pattern[str] | None"  # these, with an account behind

    def weight(self, text: str, letters: str) -> float:
        """Return 1 for each phrase or account that is enough, and 1/2 for each different other phrase.

        Args:
          text: a cleaned title.
          letters: the same, compact.
        """
        enough = set(self.one.findall(letters)) if self.one else set()
        weak = set(self.two.findall(letters)) if self.two else set()
        weak = {word for word in weak if not any(word in phrase for phrase in enough)}
        accounts = self.accounts.findall(plus_as_word(text).casefold()) if self.accounts else ()
        return len(enough) + len(accounts) + 0.5 * len(weak)


def read_adverts(file: Path) -> Adverts:
    """Read phrases in the form of words/adverts.txt.

    Raises:
      ValueError: a phrase stands before the first part, or a part has another name than one, two and accounts; names the line.
      OSError: the file cannot be read.
    """
    parts: dict[str, list[str]] = {"one": [], "two": [], "accounts": []}
    part: list[str] | None = None
    for number, line in _lines(file):
        if line.startswith("["):
            part = parts.get(line.strip("[]"))
        if part is None:
            raise ValueError(
                f"{file}, line {number}: {line!r} is in no part; write [one], [two] or [accounts] above the phrases"
            )
        if not line.startswith("["):
            part.append(line)
    return Adverts(one_of(parts["one"]), one_of(parts["two"]), _accounts(parts["accounts"]))


def read_phrases(file: Path) -> "regex.Pattern[str]":
    """Read a blocklist as a pattern on compact titles.

    Raises:
      ValueError: the file has no phrase, or a phrase without letters and digits; names the line.
      OSError: the file cannot be read.
    """
    lines = _lines(file)
    for number, line in lines:
        if one_of([line]) is None:
            raise ValueError(f"{file}, line {number}: {line!r} has no letters or digits; correct or remove it")
    found = one_of(line for _, line in lines)
    if found is None:
        raise ValueError(f"{file}: no phrase in it; write one a line, or leave the setting empty")
    return found


def read_words(file: Path) -> list[str]:
    """Read the words of a list as they are written. Raises OSError, and ValueError if the file is not UTF-8."""
    return [line for _, line in _lines(file)]


def _lines(file: Path) -> list[tuple[int, str]]:
    lines = ((number, line.strip()) for number, line in enumerate(read_lines(file), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def _accounts(names: list[str]) -> "regex.Pattern[str] | None":
    if not names:
        return None
    spaced = [f"{_JUNK}{{0,2}}".join(map(regex.escape, clean(name).casefold())) for name in sorted(names, key=len)]
    listed = "|".join(f"(?<![a-z0-9]){one}" if one[0].isascii() else one for one in reversed(spaced))
    return regex.compile(f"(?:{listed}){_ACCOUNT}")
