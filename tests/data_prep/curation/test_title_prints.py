"""Prints of titles: near-duplicates share a key, other titles hardly do, and keys are the same everywhere."""

import dataclasses
import itertools
import random
import unicodedata

import pytest

from data_prep.curation.settings import Titles
from data_prep.curation.title_prints import TitlePrint, alike, print_of, similarity
from planted_titles import CLEAN

SETTINGS = Titles()


def of(title: str) -> TitlePrint:
    return print_of(title, SETTINGS)


def test_spelling_makes_no_difference():
    one = of("小奶猫在垫子上打滚，萌化了 iPhone 15")
    for other in ("小奶猫在垫子上打滚 萌化了！ｉＰｈｏｎｅ１５", "【小奶猫】在\u200b垫子上打滚~萌化了😂iphone15"):
        assert of(other) == one
    assert unicodedata.is_normalized("NFKC", one.text)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("小奶猫在垫子上打滚，萌化了", "小奶猫在垫子上打滚，萌化了啊", True),
        ("小奶猫在垫子上打滚，萌化了", "大白鹅在池塘里游泳，笑死了", False),
        ("小猪佩奇全集动画片 第12集", "小猪佩奇全集动画片 第13集", False),
        ("小猪佩奇全集动画片 第012集", "小猪佩奇全集动画片 第12集", True),
        ("斗罗大陆动画第十二集", "斗罗大陆动画第十三集", False),
        ("小奶猫在垫子上打滚", "【超清】小奶猫在垫子上打滚，太好看", True),
        ("小奶猫在垫子上打滚", "小奶猫在垫子上打滚，主人在旁边做饭，大白鹅游泳", False),
        ("红色的圆形在移动", "黄色的圆形在移动", False),
        ("", "", False),
        ("猫", "猫", True),
        ("猫", "狗", False),
    ],
)
def test_alike(one: str, other: str, same: bool):
    assert alike(of(one), of(other), SETTINGS) is same
    assert alike(of(other), of(one), SETTINGS) is same
    if same:
        assert set(of(one).keys) & set(of(other).keys)


def test_empty_titles_have_no_keys():
    assert of("").keys == of("！！😂").keys == ()
    assert len(of("猫").keys) == SETTINGS.bands


def test_similarity_is_that_of_the_pairs_of_characters():
    assert similarity(of("一二三四五"), of("一二三四六")) == pytest.approx(3 / 5)


def test_banding_finds_pairs_as_often_as_its_docstring_says():
    """Pairs of a known similarity share a key with the probability 1 - (1 - s ** r) ** b, up to noise of the draw."""
    rng = random.Random(0)
    letters = [chr(0x4E00 + i) for i in range(5000)]
    loose = dataclasses.replace(SETTINGS, prints=16, bands=4)
    for kept, size in ((18, 20), (14, 20)):
        found, shares = 0, []
        for _ in range(300):
            grams = rng.sample(letters, 2 * size)
            one = "".join(grams[:size])
            other = one[:kept] + "".join(grams[size : 2 * size - kept])
            a, b = print_of(one, loose), print_of(other, loose)
            shares.append(similarity(a, b))
            found += bool(set(a.keys) & set(b.keys))
        share = sum(shares) / len(shares)
        expected = 1 - (1 - share**4) ** 4
        assert found / 300 == pytest.approx(expected, abs=0.09)


def test_clean_titles_are_no_duplicates_of_each_other():
    prints = [of(title) for title in CLEAN]
    assert not [(a.text, b.text) for a, b in itertools.combinations(prints, 2) if alike(a, b, SETTINGS)]
    together = sum(bool(set(a.keys) & set(b.keys)) for a, b in itertools.combinations(prints, 2))
    assert together < 30  # of 46,056 pairs: a key is worth the comparison


def test_keys_are_the_same_everywhere():
    """Pinned: other keys in another process, Python or version of the library would split the clusters of a running job."""
    assert of("小奶猫在垫子上打滚").keys[:2] == PINNED
    assert of("第100天").keys[-1] == LAST


PINNED = ("t0:91dbd2696b5b338b", "t1:b09b62da6f3c68c7")
LAST = "t15:1118574e610a1bfc"
