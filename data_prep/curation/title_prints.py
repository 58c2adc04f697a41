"""Prints of titles, to find near-duplicates among millions without comparing all pairs: MinHash with banding, by datasketch.

    one, other = TitlePrint(a, settings), TitlePrint(b, settings)
    one.keys                     # group rows by these; titles without a common key are not compared
    alike(one, other, settings)  # then compare the pairs of a group

A title is the set of its pairs of characters. Its print and keys depend on the title and on the settings only: they are the same in
every process, on every machine and with every version of Python. Titles of different numbers are never alike: "第12集" is another
video than "第13集". Equal titles alone do not make equal videos; compare the pictures too.
"""

import functools
import hashlib
import re
from typing import NamedTuple

import numpy as np
from datasketch import MinHash

from data_prep.curation.settings import Titles
from data_prep.curation.title_text import clean, compact, plain_digits

GRAM = 2  # characters; a title has 5 to 30
SHORTEST_INSIDE, SHARE_INSIDE = 5, 0.6  # of a title that another one contains: characters, and share of the other's
_SCHEME, _SEED = "affine64", 1  # of datasketch: how values are hashed. Other values give other keys.
_NUMBER = re.compile("[0-9]+|(?<=第)[零〇一二三四五六七八九十百千]+")
_ZEROS = re.compile("(?<![0-9])0+(?=[0-9])")  # episode 012 is episode 12


class TitlePrint(NamedTuple):
    """What two titles are compared by."""

    text: str  # the letters and digits of the title, in lower case, without leading zeros
    grams: frozenset[str]  # its pairs of characters; a single character is its own pair, an empty title has none
    numbers: tuple[str, ...]  # in order
    keys: tuple[str, ...]  # one for each band; none for an empty title


def print_of(title: str, settings: Titles) -> TitlePrint:
    """Return the print of a title.

    Titles that share a part `s` of their pairs of characters have a common key with the probability 1 - (1 - s ** r) ** b, where b is
    `settings.bands` and r is prints / bands: 0.9997 for s = 0.8 and 16 bands of 4. The numbers are part of a key, because titles
    with other numbers are not alike.
    """
    text = _ZEROS.sub("", plain_digits(compact(clean(title))))
    grams = frozenset(text[i : i + GRAM] for i in range(max(len(text) - GRAM + 1, 1))) if text else frozenset()
    numbers = tuple(_NUMBER.findall(text))
    return TitlePrint(text, grams, numbers, _keys(grams, numbers, settings.prints, settings.bands))


def similarity(one: TitlePrint, other: TitlePrint) -> float:
    """Return the Jaccard similarity of the pairs of characters, 0 to 1; 0 if a title is empty."""
    both = len(one.grams | other.grams)
    return len(one.grams & other.grams) / both if both else 0.0


def alike(one: TitlePrint, other: TitlePrint, settings: Titles) -> bool:
    """Whether two titles say the same.

    They share `settings.min_alike` of their pairs of characters, or one contains the other and no more than 2/3 of that again, as when a
    copy is called "...（完整版）". Their numbers must be the same, in the same order.
    """
    if one.numbers != other.numbers:
        return False
    short, long = sorted((one.text, other.text), key=len)
    inside = len(short) >= SHORTEST_INSIDE and short in long and len(short) >= SHARE_INSIDE * len(long)
    return inside or similarity(one, other) >= settings.min_alike


def _keys(grams: frozenset[str], numbers: tuple[str, ...], prints: int, bands: int) -> tuple[str, ...]:
    if not grams:
        return ()
    made = MinHash(prints, permutations=_permutations(prints), scheme=_SCHEME, seed=_SEED)
    made.update_batch([gram.encode() for gram in sorted(grams)])
    rows = np.array_split(made.hashvalues.astype("<u8"), bands)
    tail = ".".join(numbers).encode()
    digests = (hashlib.blake2b(row.tobytes() + tail, digest_size=8).hexdigest() for row in rows)
    return tuple(f"t{band}:{digest}" for band, digest in enumerate(digests))


@functools.lru_cache(maxsize=4)
def _permutations(prints: int) -> np.ndarray:
    """The permutations of datasketch for one seed, which it would draw again for every title."""
    return MinHash(num_perm=prints, seed=_SEED, scheme=_SCHEME).permutations
