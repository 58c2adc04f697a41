"""Faults of one title: addresses, telephone numbers, upload names, repetitions. All functions take a cleaned title."""

import re
from collections.abc import Sequence
from itertools import pairwise

import regex

from data_prep.curation.title_text import graphemes, plain_digits

# Endings of names in the web that are no endings of other words; .js and .net of programmers are left out below.
_ENDINGS = "com|cn|net|org|cc|tv|top|xyz|vip|info|biz|shop|site|club|online|store|wang|ltd|mobi|icu|asia|gov|edu"
_URL = regex.compile(
    r"https?\s*:\s*/\s*/|(?<![a-z0-9])www\s*\.\s*[a-z0-9]"  # a scheme, or www
    rf"|(?<![a-z0-9@.])(?!asp\.net|vb\.net|ado\.net)(?:[a-z0-9][a-z0-9-]*\.)+(?:{_ENDINGS})(?![a-z0-9])"  # a name
    r"|(?<![a-z0-9])[a-z0-9][a-z0-9-]*\.[a-z]{2,6}/[a-z0-9]"  # any name with a path
    r"|(?<![a-z0-9])(?:\d{1,3}\.){3}\d{1,3}(?::\d{2,5}|/[a-z0-9])"  # an IP address with port or path
    r"|[a-z0-9][\w.+-]*@[a-z0-9-]+\.[a-z]{2,}"  # mail
)
_DOT = regex.compile(r"(?<=[a-z0-9])\s*(?:[.。·•∙]|点|dot|\(dot\)|\[dot\])\s*(?=[a-z0-9])")
_SPELT = regex.compile(r"(?<![a-z0-9])(?:[a-z0-9.:/-] ){4,}[a-z0-9/](?![a-z0-9])")

_NUMBER = regex.compile(r"[0-9](?:[ \-–—_.·*~/()+]{0,3}[0-9])*")
_MOBILE = "1[3-9][0-9]{9}"
_HOTLINE = "[48]00[0-9]{7}"
_LANDLINE = "0(?:10|2[0-9]|[3-9][0-9]{2})[2-9][0-9]{6,7}"
_SPREAD = f"(?:(?:00)?86)?{_MOBILE}|{_HOTLINE}|{_LANDLINE}"
# Pattern of a kind of number -> sizes of its groups of digits.
_KINDS = (
    (_MOBILE, ((11,), (3, 8), (7, 4), (3, 4, 4), (3, 3, 5), (4, 3, 4))),
    (_HOTLINE, ((10,), (3, 7), (3, 3, 4), (3, 4, 3), (6, 4))),
    (_LANDLINE, ((10,), (11,), (12,), (3, 7), (3, 8), (4, 7), (4, 8), (3, 4, 4), (4, 4, 4), (4, 3, 4))),
)
_CALL = regex.compile(
    r"(?:电话|手机|热线|座机|致电|来电|拨打|联系方式|联系|tel|phone|mobile|hotline)\D{0,4}$", regex.IGNORECASE
)

MEDIA = "mp4|mov|avi|mkv|flv|wmv|3gp|m4v|webm|rmvb|rm|mpe?g|mts|m2ts|f4v|vob|ts"
_MEDIA = re.compile(rf"\s*\.\s*(?:{MEDIA})$", re.IGNORECASE)
_HASH = re.compile(r"(?=[0-9a-f-]*[0-9])(?=[0-9a-f-]*[a-f])[0-9a-f]{8}-?(?:[0-9a-f]{4}-?){3,}[0-9a-f]*|[0-9a-f]{16,}")
_TOKEN = re.compile(r"(?=\S*[0-9])(?=\S*[A-Za-z])[A-Za-z0-9_-]{16,}={0,2}")
_COUNTED = re.compile(
    r"[0-9]+(?:[.:,\-/ ]*[0-9]+)*|(?<=第)[零〇一二三四五六七八九十百千两]+(?=[集期季回话章节课讲弹部篇])"
)


def urls(text: str) -> int:
    """Return the number of addresses of the web or of mail, also with spaces, 点 or a full stop of Chinese as dots."""
    lower = text.casefold()
    if not any(mark in lower for mark in (".", "。", "·", "•", "∙", "点", "dot", "http", "www", "@", "w w")):
        return 0
    lower = _SPELT.sub(lambda match: match[0].replace(" ", ""), lower)
    return len(_URL.findall(_DOT.sub(".", lower)))


def phones(text: str) -> int:
    """Return the number of telephone numbers: mobile, landline and 400/800 ones of China, or any behind a word such as 电话.

    Digits may be of any script or Chinese, with spaces and hyphens between them. Dates, prices, amounts and ascending lists of
    numbers are none.
    """
    spelt = plain_digits(text, chinese=True)
    if sum(map(spelt.count, "0123456789")) < 7:
        return 0
    found, plain = 0, plain_digits(text)
    for view in dict.fromkeys((plain, spelt)):
        matches = [match for match in _NUMBER.finditer(view) if sum(map(str.isdigit, match[0])) >= 7]
        found = max(found, sum(_is_phone(match[0], view[: match.start()]) for match in matches))
    return found


def _is_phone(number: str, before: str) -> bool:
    groups = re.findall("[0-9]+", number)
    if len(groups) == 1:
        groups = [re.sub(f"^(?:00)?86(?={_MOBILE}$)", "", groups[0])]
    parts = (groups[i : i + size] for size in (1, 2, 3) for i in range(len(groups) - size + 1))
    if any(_is_number(part) for part in parts) or (_spread(groups) and re.fullmatch(_SPREAD, "".join(groups))):
        return True
    return 7 <= sum(map(len, groups)) <= 13 and _CALL.search(before) is not None


def _is_number(groups: Sequence[str]) -> bool:
    """Whether these groups of digits are one telephone number, divided as people do."""
    digits, sizes = "".join(groups), tuple(map(len, groups))
    return any(sizes in known and re.fullmatch(pattern, digits) for pattern, known in _KINDS)


def _spread(groups: Sequence[str]) -> bool:
    """Whether digits are spread over many groups on purpose, and are no ascending list such as "1 3 5 7 9"."""
    values = [int(group) for group in groups]
    ascending = all(a <= b for a, b in pairwise(values))
    return len(groups) >= 5 and max(map(len, groups)) <= 3 and not ascending


def template(text: str, parts: "regex.Pattern[str]") -> str:
    """Return why a title is no title: "file_name", "hash", "upload_name" (only `parts`, numbers and marks), or "".

    Args:
      text: A cleaned title.
      parts: Words of upload names, from `upload_words`.
    """
    if _MEDIA.search(text):
        return "file_name"
    bare = text.strip(" .-_()[]{}").casefold()
    if _HASH.fullmatch(bare) or (_TOKEN.fullmatch(text.strip()) and not parts.fullmatch(bare)):
        return "hash"
    return "upload_name" if text and len(text) <= 80 and parts.fullmatch(plain_digits(text).casefold()) else ""


def upload_words(words: Sequence[str]) -> "regex.Pattern[str]":
    """Return the pattern of titles that consist of these words, numbers, marks and single letters only."""
    longest = sorted({word.casefold() for word in words}, key=lambda word: (-len(word), word))
    listed = "|".join(map(regex.escape, longest))
    return regex.compile(rf"(?:{listed}|[0-9]+|[^\p{{L}}\p{{N}}]|(?<![a-z])[a-z](?![a-z]))*+")


def template_key(text: str) -> str:
    """Return a title with every number as `#`, to count in a corpus how many titles differ in numbers only; "" without a number.

    Numbers of dates and times become one `#`; "第十二集" counts as a number, other Chinese numbers do not.
    """
    plain = plain_digits(text).casefold()
    made = _COUNTED.sub("#", plain)
    return made.replace(" ", "") if made != plain else ""


def longest_run(text: str) -> int:
    """Return the largest number of equal characters in a row, without regard to case; digits and white space do not count."""
    best = run = 0
    last = ""
    for one in graphemes(text.casefold()):
        if one.isspace():
            continue
        run = run + 1 if one == last else 1
        last = one
        if not one.isdigit():
            best = max(best, run)
    return best


def repeated_share(letters: str) -> float:
    """Return the share of a compact title that repeats what stands right before it: 0.5 for "加油加油", 2/3 for three copies.

    Only the longest repetition counts, of any unit up to half the title. Repeated digits do not count.
    """
    size, best = len(letters), 0
    for unit in range(1, min(size // 2, 40) + 1):
        if size - unit <= best:
            break
        run = 0
        for i in range(unit, size):
            run = run + 1 if letters[i] == letters[i - unit] else 0
            if run > best and run >= unit and not letters[i - run + 1 : i + 1].isdigit():
                best = run
    return best / size if size else 0.0
