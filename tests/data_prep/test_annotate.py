"""Labels by people: who gets what, errors on gold items, agreement, majority, adjudication, splits and the CSVs that result."""

import csv
import itertools
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import videos
from data_prep import annotate
from data_prep.annotation import items as items_lib
from data_prep.annotation import verdicts
from data_prep.annotation.answers import Answer
from data_prep.annotation.gold_test import GoldTest, table
from data_prep.annotation.items import Item, Key, make_key
from data_prep.annotation.split_groups import groups_of, split_groups
from data_prep.rows import read_rows

CLASSES = tuple(f"类{i}" for i in range(10))


def key_of(items: int, gold: int, annotators: int, each: int = 3, kind: str = "classification") -> Key:
    asked = [Item(f"i{i:04}", f"v{i}.mp4", f"标题{i}", "", ()) for i in range(items)]
    known = [Item(f"g{i:04}", f"g{i}.mp4", f"标题g{i}", CLASSES[i % 10], ()) for i in range(gold)]
    return make_key(kind, asked, known, [f"人{i}" for i in range(annotators)], each, CLASSES, 7)


def truth_of(name: str) -> str:
    return CLASSES[int(name[1:]) % 10]


def simulated(key: Key, rates: dict[str, float], rng: random.Random) -> list[Answer]:
    """Answers of annotators who choose a wrong class with a given probability."""
    found = []
    for name, own in key.given.items():
        for item in own:
            right = truth_of(item)
            wrong = rng.choice([one for one in CLASSES if one != right])
            found.append(Answer(name, item, wrong if rng.random() < rates[name] else right))
    return found


class TestGoldItems:
    @pytest.mark.parametrize("items", [40, 100, 400])
    def test_the_critical_number_is_that_of_the_exact_test(self, items: int):
        def tail(k: int) -> float:
            return sum(math.comb(items, i) * 0.025**i * 0.975 ** (items - i) for i in range(k, items + 1))

        test = GoldTest(items, 0.025, 0.05)
        assert tail(test.critical) <= 0.05 < tail(test.critical - 1)
        assert test.p_value(test.critical) == pytest.approx(tail(test.critical))
        assert test.power(0.025) == pytest.approx(tail(test.critical))

    def test_annotators_are_found_with_the_stated_power(self):
        """1 to 10 % of errors, 100 gold items, 400 annotators of each rate through the program's own functions."""
        key, rng = key_of(0, 100, 400, each=1), random.Random(5)
        for rate in (0.01, 0.025, 0.05, 0.075, 0.10):
            people = verdicts.judged(key, simulated(key, dict.fromkeys(key.given, rate), rng), 0.025, 0.05)
            power = GoldTest(100, 0.025, 0.05).power(rate)
            found = np.mean([one["dropped"] for one in people.values()])
            assert found == pytest.approx(power, abs=3.3 * math.sqrt(power * (1 - power) / 400) + 1e-3)
        assert GoldTest(100, 0.025, 0.05).power(0.10) > 0.9 > 0.05 > GoldTest(100, 0.025, 0.05).power(0.025)

    def test_power_is_printed(self):
        text = table(GoldTest(100, 0.025, 0.05))
        assert "100 gold items: an annotator with 6 errors or more is over 2.5%" in text
        assert f"p =  10.0%: {GoldTest(100, 0.025, 0.05).power(0.1):.3f}" in text
        assert "nobody is dropped" in table(GoldTest(0, 0.025, 0.05))
        assert "too few" in table(GoldTest(0 + 1, 0.05, 0.01))


class TestWhoGetsWhat:
    @pytest.mark.parametrize(
        ("items", "annotators", "each"), [(100, 5, 3), (31, 4, 2), (7, 7, 7), (1, 3, 3), (60, 6, 4)]
    )
    def test_loads_are_balanced(self, items: int, annotators: int, each: int):
        key = key_of(items, 5, annotators, each)
        assert {name for name, item in key.items.items() if item.gold} == {f"g{i:04}" for i in range(5)}
        counts = Counter(name for own in key.given.values() for name in own)
        assert all(counts[name] == (annotators if item.gold else each) for name, item in key.items.items())
        loads = [len(own) for own in key.given.values()]
        assert all(len(set(own)) == len(own) for own in key.given.values()) and max(loads) - min(loads) <= 1

    def test_all_pairs_of_annotators_meet(self):
        key = key_of(300, 0, 6)
        pairs = Counter()
        for item in key.items:
            pairs.update(itertools.combinations([name for name in key.given if item in key.given[name]], 2))
        expected = 300 * 3 / 15
        assert len(pairs) == 15 and max(abs(count - expected) for count in pairs.values()) < expected / 2

    def test_gold_items_are_mixed_in_unseen(self):
        key = key_of(200, 50, 4)
        for own in key.given.values():
            places = [i for i, name in enumerate(own) if key.items[name].gold]
            assert abs(np.mean(places) / len(own) - 0.5) < 0.15 and max(np.diff(places)) < 40
        first, second = list(key.given.values())[:2]
        assert [n for n in first if n in set(second)] != [n for n in second if n in set(first)]
        assert key == key_of(200, 50, 4)

    def test_mistakes(self):
        item = Item("a", "a.mp4", "题", "", ())
        for gold, names, each, message in [
            ([], ["li", "li"], 1, "--annotators: a name occurs twice"),
            ([], ["li"], 2, "--each: 2 answers an item from 1 annotators; give 1 to 1"),
            ([item._replace(gold="类1")], ["li"], 1, "--gold: a.mp4 is also a candidate"),
            ([item._replace(name="b", gold="猫")], ["li"], 1, "'猫' is not among the 10 class names"),
        ]:
            with pytest.raises(ValueError, match=message):
                make_key("classification", [item], gold, names, each, CLASSES, 0)


class TestVerdicts:
    def votes(self, *given: str, each: int = 3, share: float = 0.5, kind: str = "classification") -> verdicts.Verdict:
        key = key_of(1, 0, max(each, len(given)), each)._replace(kind=kind)
        answers = [Answer(f"人{i}", "i0000", *one.split("|")) for i, one in enumerate(given)]
        return verdicts.majorities(key, answers, share)["i0000"]

    def test_majority(self):
        assert self.votes("类1", "类1", "类2").answers == ("类1",)
        assert self.votes("类1", "类2", "类3") == verdicts.Verdict((), "tie", "类1 x1, 类2 x1, 类3 x1")
        assert self.votes("类1", "类2").reason == "tie"
        assert self.votes("类1", "类1").answers == ("类1",)  # two of three are enough
        assert self.votes("类1").reason == "unanswered"
        assert self.votes().reason == "unanswered"
        assert self.votes("类1", "类1", "类2", "类3", "类4", each=5).reason == "low_agreement"
        assert self.votes("类1", "类1", "类2", share=0.7).reason == "low_agreement"

    def test_corrections(self):
        fixed = self.votes("no|一只猫", "no|一只猫", "yes|", kind="pairs")
        assert fixed == verdicts.Verdict((), "corrected", "no x2, yes x1", "一只猫")
        assert self.votes("no|", "no|", "yes|一只猫", kind="pairs").answers == ("no",)
        final = verdicts.adjudicated({"i0000": fixed}, [Answer("adjudicator", "i0000", "yes")])["i0000"]
        assert final.answers == ("yes",) and final.text == "一只猫" and not final.reason
        final = verdicts.adjudicated({"i0000": fixed}, [Answer("adjudicator", "i0000", "no", "两只猫")])["i0000"]
        assert final.text == "两只猫"

    def test_agreement_is_the_librarys(self):
        key = key_of(120, 20, 5)
        answers = simulated(key, dict(zip(key.given, (0.01, 0.05, 0.1, 0.3, 0.02), strict=True)), random.Random(3))
        found = verdicts.agreement(key, answers)
        asked = sorted(name for name, item in key.items.items() if not item.gold)
        data = np.full((5, 120), np.nan)
        for one in answers:
            if one.item in asked:
                data[int(one.annotator[1]), asked.index(one.item)] = CLASSES.index(one.answer)
        expected = krippendorff.alpha(reliability_data=data, level_of_measurement="nominal")
        assert found["alpha"] == pytest.approx(expected, abs=1e-12) and found["items"] == 120
        counts = np.stack([np.sum(data == value, axis=0) for value in range(10)])  # [classes, items]
        seen = 1 - sum(c[i] * (3 - c[i]) for c in counts.T for i in range(10)) / 2 / counts.sum()
        totals = counts.sum(axis=1)
        chance = np.sum(totals * (totals - 1)) / (totals.sum() * (totals.sum() - 1))
        assert found["alpha"] == pytest.approx((seen - chance) / (1 - chance), abs=1e-9)

    def test_agreement_without_variation_is_none(self):
        key = key_of(2, 0, 2, each=2)
        assert verdicts.agreement(key, [Answer("人0", "i0000", "类1"), Answer("人1", "i0000", "类1")])["alpha"] is None
        assert verdicts.agreement(key, []) == {"items": 0, "all_alike": None, "alpha": None}


class TestSplits:
    def test_chains_stay_together(self):
        keys = [["s:1"], ["s:1", "t:a"], ["t:a", "c:9"], ["c:9"], ["s:2"], []]
        assert groups_of(keys).tolist() == [0, 0, 0, 0, 1, 2]

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=40),
        st.integers(0, 99),
        st.randoms(),
    )
    def test_no_key_straddles_and_order_does_not_matter(
        self, pairs: list[tuple[int, int]], seed: int, rng: random.Random
    ):
        ids = [f"v{i}" for i in range(len(pairs))]
        keys = [[f"s:{a}" if a else "", f"t:{b}" if b else ""] for a, b in pairs]
        shares = {"train": 0.6, "val": 0.2, "test": 0.2}
        found = dict(zip(ids, split_groups(ids, keys, shares, seed), strict=True))
        for value in {one for row in keys for one in row if one}:
            assert len({found[name] for name, row in zip(ids, keys, strict=True) if value in row}) == 1
        order = list(range(len(ids)))
        rng.shuffle(order)
        again = split_groups([ids[i] for i in order], [keys[i] for i in order], shares, seed)
        assert dict(zip([ids[i] for i in order], again, strict=True)) == found

    def test_shares(self):
        ids = [f"v{i}" for i in range(1000)]
        shares = {"train": 0.8, "val": 0.15, "test": 0.05, "none": 0.0}
        found = split_groups(ids, [[f"s:{i // 2}"] for i in range(1000)], shares, 3)
        assert Counter(found) == {"train": 800, "val": 150, "test": 50}
        assert found != split_groups(ids, [[f"s:{i // 2}"] for i in range(1000)], shares, 4)
        with pytest.raises(ValueError, match="not shares of a whole"):
            split_groups(ids, [[]] * 1000, {"train": 0.8, "val": 0.1}, 0)


# The program


def write(path: Path, header: str, *rows: str) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    for i in range(12):
        videos.write(root / f"v{i}.mp4", frames=6 if i else 1)
    (root / "bad.mp4").write_bytes(b"no video")
    return root


def fill(sheet: Path, answer_of, out: Path) -> Path:
    """Answer a sheet: `answer_of(row)` returns the cells to set."""
    with open(sheet, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    with open(out, "w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, **answer_of(row)} for row in rows)
    return out


def test_classification_from_sheets_to_csvs(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]):
    """The whole way, with an annotator who makes errors, an item without a majority, and a source that must not straddle."""
    candidates = write(
        tmp_path / "c.csv",
        "video_id:FILE,title,source",
        *[f'v{i}.mp4,"标题，{i}",up{i % 3}' for i in range(9)],
        "bad.mp4,坏,up9",
    )
    gold = write(tmp_path / "g.csv", "video_id:FILE,title,label", *[f"v{i}.mp4,金{i},类{i % 2}" for i in (9, 10, 11)])
    names = write(tmp_path / "names.txt", "类0", "类1")
    out, done = tmp_path / "sheets", tmp_path / "done"
    flags = ["--kind", "classification", "--csv", candidates, "--gold", gold, "--classes", names, "--video_root", clips, "--together", "source",
             "--annotators", "li", "王 芳", "zhao", "--frames", "4", "--out", out]  # fmt: skip
    assert annotate.main(["sheets", *map(str, flags)]) == 0
    said = capsys.readouterr().out
    assert "9 items and 3 gold items for 3 annotators, 12 to 12 each" in said and "1 items left out" in said
    assert json.loads((out / "unreadable.jsonl").read_text())["file"] == "bad.mp4"
    page = (out / "sheet-王_芳.html").read_text(encoding="utf-8")
    assert (
        page.count("data:image/jpeg;base64,") == 4 * 11 + 1
        and "gold" not in re.sub('base64,[^"]*', "", page).lower()
        and "标题，3" in page
    )
    assert "http" not in page.split("<body>")[1].replace("https", "http")

    right = {f"v{i}.mp4": f"类{i % 2}" for i in range(12)}
    bad = {"li": lambda f: False, "王 芳": lambda f: f == "v3.mp4", "zhao": lambda f: f != "v0.mp4"}
    files = []
    for name in bad:
        plain = name.replace(" ", "_")

        def flip(row: dict[str, str], name: str = name) -> dict[str, str]:
            return {"answer": "类1" if (right[row["file"]] == "类1") != bad[name](row["file"]) else "类0"}

        files.append(fill(out / f"sheet-{plain}.csv", flip, tmp_path / f"a-{plain}.csv"))
    merge = ["merge", "--key", out / "key.json", "--answers", *files, "--out", done, "--shares", "0.34", "0.33", "0.33"]
    assert annotate.main([*map(str, merge)]) == 0
    said = capsys.readouterr().out
    assert "zhao: 12 answers; 3 errors on 3 gold items -> dropped" in said
    facts = json.loads((done / "agreement.json").read_text(encoding="utf-8"))
    assert facts["annotators"]["zhao"]["dropped"] and not facts["annotators"]["li"]["dropped"]
    assert facts["to_adjudicate"]["tie"] == 1 and facts["decided"] == 8 and facts["answers_kept"] == 24

    answered = fill(done / "adjudication.csv", lambda row: {"answer": "类1"}, tmp_path / "adjudicated.csv")
    assert annotate.main([*map(str, merge), "--adjudicated", str(answered)]) == 0
    assert not (done / "adjudication.csv").exists()
    homes: dict[str, set[str]] = {}
    seen = {}
    for split in ("train", "val", "test"):
        for row in read_rows(done / f"classification_{split}.csv", "classification", ("类0", "类1")):
            assert not row.problem
            seen[row.media_id] = (row.label_text, row.title)
            homes.setdefault(f"up{int(row.media_id[1]) % 3}", set()).add(split)
    assert seen == {f"v{i}.mp4": (f"类{i % 2}", f"标题，{i}") for i in range(9)}
    assert all(len(found) == 1 for found in homes.values()) and len(homes) == 3


def test_pairs_and_corrected_texts(tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]):
    candidates = write(
        tmp_path / "c.csv",
        "clip_name:FILE,caption",
        "v1.mp4,红色的圆",
        "v1.mp4,蓝色的方",
        "v2.mp4,绿色的星",
        "v3.mp4,黄色的线",
    )
    out, done = tmp_path / "sheets", tmp_path / "done"
    flags = [
        "--kind",
        "pairs",
        "--csv",
        candidates,
        "--video_root",
        clips,
        "--annotators",
        "a",
        "b",
        "c",
        "--frames",
        "1",
        "--out",
        out,
    ]
    assert annotate.main(["sheets", *map(str, flags)]) == 0
    assert "nobody is dropped" in capsys.readouterr().out

    def answer(row: dict[str, str]) -> dict[str, str]:
        if row["caption"] == "绿色的星":
            return {"answer": "No", "correction": "绿色的 星星"}
        return {"answer": "no" if row["caption"] == "黄色的线" else "yes"}

    files = [fill(out / f"sheet-{name}.csv", answer, tmp_path / f"{name}.csv") for name in "abc"]
    merge = [
        "merge",
        "--key",
        out / "key.json",
        "--answers",
        *files,
        "--out",
        done,
        "--shares",
        0,
        0,
        1,
        "--video_root",
        clips,
    ]
    assert annotate.main([*map(str, merge)]) == 0
    assert "1 corrected" in capsys.readouterr().out
    assert [row.captions for row in read_rows(done / "retrieval_test.csv", "retrieval")] in (
        [("红色的圆",), ("蓝色的方",)], [("蓝色的方",), ("红色的圆",)],
    )  # fmt: skip
    assert "绿色的 星星" in (done / "adjudication.html").read_text(encoding="utf-8")
    answered = fill(done / "adjudication.csv", lambda row: {"answer": "yes"}, tmp_path / "adjudicated.csv")
    assert annotate.main([*map(str, merge), "--adjudicated", str(answered)]) == 0
    assert ("绿色的 星星",) in [row.captions for row in read_rows(done / "retrieval_test.csv", "retrieval")]


def test_captions_are_collected_and_checked(tmp_path: Path, clips: Path):
    candidates = write(tmp_path / "c.csv", "video_id:FILE", "v1.mp4", "v2.mp4")
    out, done = tmp_path / "sheets", tmp_path / "done"
    flags = [
        "--kind",
        "captions",
        "--csv",
        candidates,
        "--video_root",
        clips,
        "--annotators",
        *"abcd",
        "--each",
        "4",
        "--out",
        out,
    ]
    assert annotate.main(["sheets", *map(str, flags)]) == 0
    written = {
        "v1.mp4": dict(
            a="一只小猫在垫子上打滚。", b="一只小猫在垫子上打滚！", c="灰白花纹的猫仰面躺着", d="猫咪对着镜头伸出爪子"
        ),
        "v2.mp4": dict(a="一个人在雪地里滑雪", b="snow board", c="滑雪", d="戴雪镜的人左右转弯"),
    }
    files = [
        fill(
            out / f"sheet-{name}.csv",
            lambda row: {"answer": written[row["file"]][row["annotator"]]},
            tmp_path / f"{name}.csv",
        )
        for name in "abcd"
    ]
    merge = ["merge", "--key", out / "key.json", "--answers", *files, "--out", done, "--shares", 0, 1, 0]
    assert annotate.main([*map(str, merge)]) == 0
    facts = json.loads((done / "agreement.json").read_text(encoding="utf-8"))
    assert sorted(one["why"] for one in facts["refused"]) == [
        "duplicate of 一只小猫在垫子上打滚。",
        "not_chinese",
        "short",
    ]
    (row,) = read_rows(done / "captioning_val.csv", "captioning")
    assert row.media_id == "v1.mp4" and len(row.captions) == 3 and facts["to_adjudicate"]["few_captions"] == 1
    answered = fill(
        done / "adjudication.csv", lambda row: {"answer": "蓝天下有人踩着单板"}, tmp_path / "adjudicated.csv"
    )
    assert annotate.main([*map(str, merge), "--adjudicated", str(answered)]) == 0
    rows = read_rows(done / "captioning_val.csv", "captioning")
    assert {row.media_id: len(row.captions) for row in rows} == {"v1.mp4": 3, "v2.mp4": 3}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A key of two annotators, two items and their sheets with answers."""
    key = key_of(2, 1, 2, each=2)
    (tmp_path / "key.json").write_text(items_lib.as_json(key), encoding="utf-8")
    for name in key.given:
        rows = [f"{name},{item},f,t,{truth_of(item)}" for item in key.given[name]]
        write(tmp_path / f"{name}.csv", "annotator,item,file,title,answer", *rows)
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("人0.csv", "类0", "类x"), "'类x' is not among the 10 class names"),
        (("人0.csv", "i0001", "i0009"), "item i0009 was not given to 人0"),
        (("人0.csv", "i0001", "i0000"), "item i0000 for the second time"),
        (("人0.csv", "人0", "李"), "no sheet was made for annotator '李'"),
        (("人1.csv", "人1", "人0"), "annotator '人0' is also that of"),
        (("key.json", "ymplug_jax annotation", "other"), "not a key of annotation sheets; give the key.json"),
        (("key.json", '"seed"', '"sead"'), "damaged; give the key.json"),
    ],
)
def test_wrong_answers_are_refused(
    small: Path, capsys: pytest.CaptureFixture[str], change: tuple[str, str, str], message: str
):
    name, old, new = change
    text = (small / name).read_text(encoding="utf-8")
    assert old in text
    (small / name).write_text(text.replace(old, new), encoding="utf-8")
    flags = ["--key", small / "key.json", "--answers", small / "人0.csv", small / "人1.csv", "--out", small / "done"]
    assert annotate.main(["merge", *map(str, flags)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (small / "done").exists()


def test_answers_of_the_adjudicator_are_not_overwritten(small: Path, capsys: pytest.CaptureFixture[str]):
    done = small / "done"
    done.mkdir()
    write(done / "adjudication.csv", "annotator,item,answer", "adjudicator,i0000,类1")
    flags = ["--key", small / "key.json", "--answers", small / "人0.csv", small / "人1.csv", "--out", done]
    assert annotate.main(["merge", *map(str, flags)]) == 2
    assert "has answers, and would be overwritten" in capsys.readouterr().err


def test_the_key_survives_its_file(tmp_path: Path):
    key = key_of(5, 2, 3)
    (tmp_path / "key.json").write_text(items_lib.as_json(key), encoding="utf-8")
    assert items_lib.read_key(tmp_path / "key.json") == key
