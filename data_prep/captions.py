"""The cells of golden_caption: a plain text, or a Python list of strings as the release writes it in validation."""

import ast
import io
import re
import tokenize
import warnings

# What begins like a list of strings, whoever wrote it: quotes behind the bracket, or a missing value.
LIST_LIKE = re.compile(
    r"(array|Index|Series|list)?\(?\[[\[(\s]*(['\"‘’“”]|[urbfURBF]{1,2}['\"]|(None|nan|NaN|null|array)\b)"
)

MISSING = ("None", "nan", "NaN", "null", "NULL", "<NA>", "NaT")  # as Python, numpy, pandas and databases print it


def captions_of(value: str) -> tuple[tuple[str, ...], str]:
    """(captions, problem): the captions of one cell, or why it has none that can be used.

    `['一。', '二。']` is a list of two. A text such as `[搞笑] 小猫打滚` is one caption, as it stands; an empty cell has none.
    What numpy and pandas print (`['a' 'b']`, `['a', None]`, `array([...])`), lists of anything but strings, and empty lists
    or strings are problems.
    """
    value = value.strip()
    if not value:
        return (), ""
    if value in MISSING:
        return (), f"golden_caption is {value}, a missing value and no caption; leave the cell empty"
    items = _literal(value)
    if isinstance(items, list):
        return _strings(value, items)
    if isinstance(items, tuple | set | dict) and any(isinstance(item, str) for item in items):
        return (), f"golden_caption is a {type(items).__name__}, not a list of strings such as ['一。', '二。']"
    if LIST_LIKE.match(value):
        return (), "golden_caption begins like a list but is none of strings, such as ['一。', '二。']"
    return (value,), ""


def _literal(value: str) -> object:
    """The Python literal that the text is, or None."""
    if value[0] not in "[({":
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes such as \d
            return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _strings(value: str, items: list) -> tuple[tuple[str, ...], str]:
    """The items, if they are strings with commas between them."""
    if not items:
        return (), "golden_caption is an empty list"
    for item in items:
        if not isinstance(item, str):
            return (), f"golden_caption holds {item!r:.40}, which is no string"
        if not item.strip():
            return (), "golden_caption holds an empty string"
    tokens = tokenize.generate_tokens(io.StringIO(f"({value})").readline)
    if sum(token.type == tokenize.STRING for token in tokens) != len(items):
        return (), "golden_caption holds strings without commas between them, as numpy prints them"
    return tuple(items), ""
