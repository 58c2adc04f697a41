"""Views of a title in which disguised text is plain: width of characters, zero-width characters, spaced-out digits and words."""

import functools
import unicodedata
from collections.abc import Iterable

import regex

# Characters that draw nothing. A joiner inside an emoji stays, so that a family of four remains one character.
_INVISIBLE = regex.compile(r"(?V1)[\p{Default_Ignorable_Code_Point}--\u200d]|[\x00-\x08\x0e-\x1f\x7f]")
_LOOSE_JOINER = regex.compile(
    r"(?<![\p{Extended_Pictographic}\p{Emoji_Modifier}])\u200d|\u200d(?!\p{Extended_Pictographic})"
)
_KEYCAP = regex.compile(r"\u20e3")
_SPACES = regex.compile(r"\s+")
_NOT_WORDS = regex.compile(r"[^\p{L}\p{N}]+")
_GRAPHEME = regex.compile(r"\X")
_WORDS = regex.compile(
    r"\p{Han}|\p{Hiragana}|\p{Katakana}|\p{Hangul}|[\p{L}--[\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}]]+", regex.V1
)
_HAN = regex.compile(r"\p{Han}")
_PLUS = regex.compile(r"[+➕✚]\s*(?=[\p{Han}vVwWqQ])")

# Chinese digits, also those of banks; 幺 is how 1 is read in telephone numbers. 两 and 十 are no digits of a number that is spelt out.
CHINESE_DIGITS = dict(zip("零〇一二三四五六七八九幺壹贰叁肆伍陆柒捌玖貳參陸", "001234567891123456789236", strict=True))


def clean(title: str) -> str:
    """Return the title as it is read: NFKC, invisible characters removed, one space for any white space, none around it."""
    text = _KEYCAP.sub("", _INVISIBLE.sub("", unicodedata.normalize("NFKC", title)))
    return _SPACES.sub(" ", _LOOSE_JOINER.sub("", text)).strip()


def compact(text: str) -> str:
    """Return the letters and digits of a cleaned title in lower case: "加 ❤ 微—信" and "➕微信" are both "加微信"."""
    return _NOT_WORDS.sub("", plus_as_word(text)).casefold()


def plus_as_word(text: str) -> str:
    """Return the text with a plus sign before a word as 加: "+v" is "加v"."""
    return _PLUS.sub("加", text)


def graphemes(text: str) -> list[str]:
    """Return the characters as a reader counts them; an emoji of several code points is one."""
    return _GRAPHEME.findall(text)


def chinese_share(text: str) -> float:
    """Return the share of Chinese characters among the words.

    A Chinese character, a kana and a Korean syllable count as one word each, and so does a word of any other script: "iPhone 15 开箱"
    has two Chinese words of three. Without any word, the share is 0.
    """
    words = len(_WORDS.findall(text))
    return len(_HAN.findall(text)) / words if words else 0.0


def plain_digits(text: str, *, chinese: bool = False) -> str:
    """Return the text with every digit character as one of 0 to 9; with `chinese`, Chinese digits too."""
    return text if text.isascii() else text.translate(_digits(chinese))


@functools.lru_cache(maxsize=2)
def _digits(chinese: bool) -> dict[int, str]:
    """Code point -> digit, of all digit characters that are not ASCII."""
    values = ((code, unicodedata.digit(chr(code), None)) for code in (*range(0x80, 0x10000), *range(0x1D000, 0x1FC00)))
    table = {code: str(value) for code, value in values if value is not None}
    return table | ({ord(one): digit for one, digit in CHINESE_DIGITS.items()} if chinese else {})


def one_of(words: Iterable[str]) -> "regex.Pattern[str] | None":
    """Return a pattern of phrases in their compact form, None without any. `…` inside a phrase stands for up to six characters."""
    plain, gapped = [], []
    for word in words:
        parts = [compact(clean(part)) for part in word.split("…")]
        if len(parts) > 1 and all(parts):
            gapped.append(".{0,6}?".join(map(regex.escape, parts)))
        elif found := "".join(parts):
            plain.append(found)
    if not plain and not gapped:
        return None
    pattern = "|".join([*gapped, *([r"\L<plain>"] if plain else [])])
    return regex.compile(pattern, **({"plain": sorted(set(plain), key=lambda one: (-len(one), one))} if plain else {}))
