"""Titles with a known fault, for planted corpora."""

import string
from collections.abc import Callable

import numpy as np

ADVERTS = (
    "点击下方链接领取优惠券", "全场五折包邮，限时抢购", "加微信{code}免费领取资料", "扫码关注公众号，免费领红包", "招代理，日入过千，加QQ{digits}",
    "厂家直销，货到付款，欢迎订购", "下载APP领取新人大礼包",
)  # fmt: skip
TEMPLATES = (
    "IMG_{digits}",
    "VID_2021{digits}",
    "视频_2020{digits}",
    "未命名{digits}",
    "新建项目{digits}",
    "我的视频{digits}",
    "mmexport{digits}",
)
ENGLISH = (
    "a red ball is moving up",
    "my new video",
    "funny clip part two",
    "asdf qwer zxcv",
    "official trailer HD",
    "best moments ever",
)


def _digits(rng: np.random.Generator, count: int) -> str:
    return "".join(str(d) for d in rng.integers(0, 10, count))


def _word(rng: np.random.Generator, count: int) -> str:
    return "".join(rng.choice(list(string.ascii_lowercase), count))


def _with(rng: np.random.Generator, title: str, other: str) -> str:
    return f"{title} {other}" if rng.random() < 0.5 else f"{other} {title}"


def url(title: str, rng: np.random.Generator) -> str:
    """A title with an address of a web page."""
    forms = ("https://{}.com/v/{}", "www.{}.cn/{}", "http://{}.net?id={}", "{}.com/{}")
    return _with(rng, title, str(rng.choice(forms)).format(_word(rng, 6), _digits(rng, 5)))


def phone(title: str, rng: np.random.Generator) -> str:
    """A title with a phone number."""
    number = f"1{rng.integers(3, 10)}{_digits(rng, 9)}"
    forms = (
        number,
        f"{number[:3]}-{number[3:7]}-{number[7:]}",
        f"{number[:3]} {number[3:7]} {number[7:]}",
        f"电话{number}",
    )
    return _with(rng, title, str(rng.choice(forms)))


def advert(title: str, rng: np.random.Generator) -> str:
    """A title with an advertisement."""
    return _with(rng, title, str(rng.choice(ADVERTS)).format(code=_word(rng, 6), digits=_digits(rng, 8)))


def template(title: str, rng: np.random.Generator) -> str:
    """The name that a camera or an editor gave the file."""
    return str(rng.choice(TEMPLATES)).format(digits=_digits(rng, 6))


def repeated(title: str, rng: np.random.Generator) -> str:
    """A title of which most is one repeated character or word."""
    part, count = str(rng.choice(["哈", "啊", "！", "666", "好看", "快看"])), int(rng.integers(8, 15))
    return part * count if rng.random() < 0.5 else f"{title}{part * 2 * count}"


def short(title: str, rng: np.random.Generator) -> str:
    """A title of one character."""
    return str(rng.choice(list("好看美赞哦嗯秀")))


def foreign(title: str, rng: np.random.Generator) -> str:
    """A title without a Chinese character."""
    return f"{rng.choice(ENGLISH)}{'' if rng.random() < 0.5 else f' {rng.integers(1, 100)}'}"


FAULTS: dict[str, Callable[[str, np.random.Generator], str]] = {
    "url": url, "phone": phone, "advert": advert, "template": template, "repeated": repeated, "short": short, "foreign": foreign,
}  # fmt: skip


def altered(title: str, rng: np.random.Generator) -> str:
    """A title that says the same in other words, as that of a copied video."""
    forms = ("{}", "【{}】", "{}！", "超清：{}", "{}（完整版）", "一个{}", "{}，太好看了")
    return str(rng.choice(forms)).format(title)
