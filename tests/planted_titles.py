"""Titles with one fault each, drawn from a seed: clean titles with an address, a number, an advert ..., disguised as people do it."""

import random
from pathlib import Path

CLEAN = (
    (Path(__file__).parent / "data_prep" / "curation" / "clean_titles.txt").read_text(encoding="utf-8").split("\n")[:-1]
)
CHINESE = "零一二三四五六七八九"
FULL_WIDTH = "０１２３４５６７８９"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FAULTS = ("url", "phone", "advert", "template", "repeats", "short", "not_chinese")


def draw(fault: str, rng: random.Random) -> str:
    """Draw a title with a fault, one of FAULTS."""
    return {
        "url": _url, "phone": _phone, "advert": _advert, "template": _template, "repeats": _repeats, "short": _short,
        "not_chinese": _foreign,
    }[fault](rng)  # fmt: skip


def _word(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(low, high)))


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _beside(rng: random.Random, text: str) -> str:
    """Put a text before or behind the beginning of a clean title."""
    start = rng.choice(CLEAN)[: rng.randint(4, 12)].rstrip("0123456789 .")
    return rng.choice([f"{start} {text}", f"{text} {start}", f"{start}，{text}"])


def _disguised(rng: random.Random, text: str) -> str:
    way = rng.choice(["plain", "plain", "full", "spaces", "invisible"])
    if way == "full":
        return "".join(chr(ord(one) + 0xFEE0) if "!" <= one <= "~" else one for one in text)
    if way == "spaces":
        return " ".join(text)
    return text.replace(text[1], f"{text[1]}\u200b") if way == "invisible" else text


def _url(rng: random.Random) -> str:
    name = f"{_word(rng, 3, 9)}{rng.choice(['', _digits(rng, 2)])}"
    ending = rng.choice(["com", "cn", "net", "com.cn", "cc", "top", "tv", "xyz", "vip"])
    made = rng.choice([f"www.{name}.{ending}", f"http://{name}.{ending}/{_word(rng, 3, 6)}", f"https://{name}.{ending}",
                       f"{name}.{ending}", f"t.cn/{_word(rng, 5, 7)}", f"{name}@{_word(rng, 3, 5)}.{ending}", f"{name}点{ending}"])  # fmt: skip
    return _beside(rng, made if "点" in made else _disguised(rng, made))


def _phone(rng: random.Random) -> str:
    mobile = f"1{rng.choice('3456789')}{_digits(rng, 9)}"
    kind = rng.randrange(4)
    if kind == 0:
        area = rng.choice(["010", "021", "0571", "0755", "028"])
        made = f"{area}-{rng.choice('2345678')}{_digits(rng, 7)}"
    elif kind == 1:
        made = f"400-{_digits(rng, 3)}-{_digits(rng, 4)}"
    else:
        table = rng.choice(["0123456789", FULL_WIDTH, CHINESE])
        made = rng.choice([mobile, f"{mobile[:3]} {mobile[3:7]} {mobile[7:]}", f"{mobile[:3]}-{mobile[3:7]}-{mobile[7:]}",
                           " ".join(mobile), "\u200b".join(mobile)]).translate(dict(enumerate(table, 48)))  # fmt: skip
    return _beside(rng, rng.choice(["", "电话", "联系", "Tel:"]) + made)


def _advert(rng: random.Random) -> str:
    account = f"{_word(rng, 3, 6)}{_digits(rng, 4)}"
    made = rng.choice([
        "加微信{}", "微信：{}", "加V：{}", "vx:{}", "薇信号{}", "QQ群{}", "加Q{}", "公众号：{}", "限时优惠，全场{}折", "厂家直销全国包邮", "点击下方链接购买",
        "扫码进群领福利", "诚招代理日赚{}元", "免费领取优惠券", "清仓甩卖，买一送一", "关注公众号领红包", "私信领取资料", "咨询热线随时拨打", "兼职日结，在家赚钱",
        "特价促销，先到先得", "下单立减，赶快抢购",
    ])  # fmt: skip
    digits = any(mark in made for mark in ("Q", "折", "元"))
    made = made.format(rng.choice("123456789") + _digits(rng, 7 if "Q" in made else 0) if digits else account)
    if rng.random() < 0.2:
        made = made.replace("加", "➕")
    if rng.random() < 0.2:
        made = made.replace("微信", rng.choice(["微 信", "微❤信", "微-信", "微\u200b信"]))
    return _beside(rng, made)


def _template(rng: random.Random) -> str:
    date = f"20{rng.randint(10, 24)}{rng.randint(1, 12):02}{rng.randint(1, 28):02}"
    return rng.choice([
        f"IMG_{date}_{_digits(rng, 6)}", f"VID_{date}_{_digits(rng, 6)}", f"VID{date}{_digits(rng, 6)}", f"DSC_{_digits(rng, 4)}",
        f"MOV_{_digits(rng, 4)}.mp4", f"{_word(rng, 3, 8)}.mp4", f"未命名{rng.randint(1, 99)}", "未命名", f"未命名视频 {rng.randint(1, 99)}",
        f"{date[:4]}-{date[4:6]}-{date[6:]}", f"{date[:4]}年{int(date[4:6])}月{int(date[6:])}日", f"{date}_{_digits(rng, 6)}",
        "".join(rng.choice("0123456789abcdef") for _ in range(32)), f"mmexport{_digits(rng, 13)}", f"微信视频{date}{_digits(rng, 6)}",
        f"新建项目 {rng.randint(1, 99)}", f"录屏_{date}_{_digits(rng, 6)}", f"Screenrecorder-{date}-{_digits(rng, 6)}", f"我的视频{rng.randint(1, 99)}",
        _digits(rng, 10), f"PXL_{date}_{_digits(rng, 9)}", f"测试{rng.randint(1, 999)}", f"第{rng.randint(1, 200)}集", f"{rng.choice(CLEAN)[:6]}.mp4",
    ])  # fmt: skip


def _repeats(rng: random.Random) -> str:
    clean = rng.choice(CLEAN)
    return rng.choice([
        rng.choice("哈好啊呵赞猫顶！6。") * rng.randint(9, 20), clean[:3] + rng.choice("哈啊好！～") * rng.randint(9, 15),
        rng.choice(["搞笑视频", "小猫", "看看", "来了来了", "转发"]) * rng.randint(4, 6), "，".join(["快来看"] * rng.randint(4, 6)),
        rng.choice("😂🔥❤👍") * rng.randint(8, 15) + clean[:4],
    ])  # fmt: skip


def _short(rng: random.Random) -> str:
    return rng.choice(
        ["猫", "好看", "小猫", "搞笑", "来了", "嗯嗯", "", " ", "狗。", "舞蹈", "\u200b猫\u200b\u200b\u200b\u200b"]
    )


def _foreign(rng: random.Random) -> str:
    return rng.choice([
        " ".join(_word(rng, 3, 8) for _ in range(rng.randint(2, 5))), "かわいいねこのどうが", "귀여운 고양이가 놀아요", "Смешные коты играют",
        f"{_word(rng, 4, 9).title()} Official Video", f"{_word(rng, 3, 6)} {_word(rng, 4, 8)} 猫 {_word(rng, 3, 6)} {_word(rng, 3, 6)} {_word(rng, 3, 6)}",
        "！？……～～～。。。", "🐶🐱🐭🐹🐰",
    ])  # fmt: skip
