"""Parser of golden_caption cells: plain text, or a Python list of strings as in the validation CSV of Youku-mPLUG."""

import ast
import io
import re
import tokenize
import warnings

# Beginning of a printed list of strings: a bracket followed by a quote or a missing value.
LIST_LIKE = re.compile(
    r"(array|Index|Series|list)?\(?\[[\[(\s]*(['\"‘’“”]|[urbfURBF]{1,2}['\"]|(None|nan|NaN|null|array)\b)"
)

MISSING = (
    "None",
    "nan",
    "NaN",
    "null",
    "NULL",
    "<NA>",
    "NaT",
)  # missing values as printed by Python, NumPy, pandas and databases


def captions_of(value: str) -> tuple[tuple[str, ...], str]:
    """Parse a cell to (captions, problem), where `problem` explains why the cell is rejected, or is "".

    `['一。', '二。']` gives two captions. Text such as `[搞笑] 小猫打滚` is one caption; an empty cell gives none. Rejected are
    arrays printed by NumPy or pandas (`['a' 'b']`, `['a', None]`, `array([...])`), lists with items that are not strings, and
    empty lists or strings.
    """
    value = value.strip()
    if not value:
        return (), ""
    if value in MISSING:
        return (), f"golden_caption is {value}, which is a missing value, not a caption; leave the cell empty"
    items = _literal(value)
    if isinstance(items, list):
        return _strings(value, items)
    if isinstance(items, tuple | set | dict) and any(isinstance(item, str) for item in items):
        return (), f"golden_caption is a {type(items).__name__}, not a list of strings such as ['一。', '二。']"
    if LIST_LIKE.match(value):
        return (), "golden_caption begins like a list but is not a list of strings such as ['一。', '二。']"
    return (value,), ""


def _literal(value: str) -> object:
    """Parse the text as a Python literal; None if it is not one."""
    if value[0] not in "[({":
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # unknown escapes such as \d
            return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _strings(value: str, items: list) -> tuple[tuple[str, ...], str]:
    """Return the items as `captions_of` does, if they are strings separated by commas."""
    if not items:
        return (), "golden_caption is an empty list"
    for item in items:
        if not isinstance(item, str):
            return (), f"golden_caption holds {item!r:.40}, which is not a string"
        if not item.strip():
            return (), "golden_caption holds an empty string"
    tokens = tokenize.generate_tokens(io.StringIO(f"({value})").readline)
    if sum(token.type == tokenize.STRING for token in tokens) != len(items):
        return (), "golden_caption holds strings without commas between them, as NumPy prints them"
    return tuple(items), ""
