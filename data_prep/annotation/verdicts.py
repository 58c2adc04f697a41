"""What the answers of several people say: errors on gold items, agreement, the majority, and what somebody has to adjudicate."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import krippendorff
import numpy as np

from data_prep.annotation.answers import ADJUDICATOR, Answer
from data_prep.annotation.gold_test import GoldTest, powers
from data_prep.annotation.items import NO, YES, Key
from data_prep.curation.settings import Titles
from data_prep.curation.title_prints import alike, print_of
from data_prep.curation.title_text import chinese_share, clean, graphemes

# Why an item needs an adjudicator -> meaning.
REASONS = {
    "unanswered": "fewer answers than a majority of those asked for, after sheets of dropped annotators are left out",
    "tie": "two answers are given most often",
    "low_agreement": "the most frequent answer has too small a share",
    "corrected": "the text does not describe the video, and somebody wrote another one",
    "few_captions": "too few different captions are left after the checks",
}


class Verdict(NamedTuple):
    """What an item's answers say. Either `answers` are final, or `reason` says why somebody has to adjudicate."""

    answers: tuple[str, ...]  # the class; yes or no; or captions
    reason: str = ""  # a key of REASONS
    votes: str = ""  # for the adjudicator: the answers and how often they were given
    text: str = ""  # kind pairs: a corrected text


def judged(key: Key, answers: Sequence[Answer], bound: float, significance: float) -> dict[str, dict[str, Any]]:
    """Test every annotator on the gold items that he or she answered.

    Returns:
      Annotator -> "gold", "errors", "p_value", "critical", "dropped", "power" (true error rate -> probability to be found), "answers".
    """
    by_name: dict[str, list[Answer]] = {name: [] for name in key.given}
    for answer in answers:
        by_name[answer.annotator].append(answer)
    found = {}
    for name, own in by_name.items():
        gold = [answer for answer in own if key.items[answer.item].gold]
        errors = sum(answer.answer != key.items[answer.item].gold for answer in gold)
        test = GoldTest(len(gold), bound, significance)
        found[name] = {
            "answers": len(own), "gold": len(gold), "errors": errors, "critical": test.critical, "p_value": test.p_value(errors),
            "dropped": bool(gold) and test.fails(errors), "power": {f"{rate:g}": power for rate, power in powers(test).items()},
        }  # fmt: skip
    return found


def agreement(key: Key, answers: Sequence[Answer]) -> dict[str, Any]:
    """Krippendorff's alpha for names, and the share of items that all who answered them answer alike; without gold items.

    Alpha is 1 for perfect agreement and 0 for agreement by chance. It is None if no item has two answers, or all answers are equal.
    """
    asked = [answer for answer in answers if not key.items[answer.item].gold]
    names, items = sorted({one.annotator for one in asked}), sorted({one.item for one in asked})
    domain = sorted({one.answer for one in asked})
    values = np.full((len(names), len(items)), np.nan)
    rows, columns, codes = (_places(one) for one in (names, items, domain))
    for one in asked:
        values[rows[one.annotator], columns[one.item]] = codes[one.answer]
    several = values[:, np.sum(~np.isnan(values), axis=0) >= 2]
    alike = [len(set(column[~np.isnan(column)])) == 1 for column in several.T]
    made: dict[str, Any] = {"items": len(alike), "all_alike": float(np.mean(alike)) if alike else None, "alpha": None}
    if len(set(several[~np.isnan(several)])) > 1:
        made["alpha"] = float(
            krippendorff.alpha(
                reliability_data=several, value_domain=list(range(len(domain))), level_of_measurement="nominal"
            )
        )
    return made


def _places(names: Sequence[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}


def majorities(key: Key, answers: Sequence[Answer], share: float) -> dict[str, Verdict]:
    """Decide every item that is no gold item by the answer of more than `share` of those who answered it.

    An item needs answers of more than half of those asked for. Equal numbers of the most frequent answers are a tie, whatever the share.
    """
    by_item: dict[str, list[Answer]] = {name: [] for name, item in key.items.items() if not item.gold}
    for answer in answers:
        if answer.item in by_item:
            by_item[answer.item].append(answer)
    return {name: _majority(own, key.each, share) for name, own in by_item.items()}


def _majority(answers: Sequence[Answer], each: int, share: float) -> Verdict:
    counts = sorted(Counter(answer.answer for answer in answers).items(), key=lambda one: (-one[1], one[0]))
    votes = ", ".join(f"{answer} x{count}" for answer, count in counts)
    corrections = sorted({answer.correction for answer in answers if answer.answer == NO and answer.correction})
    text = (
        Counter(a.correction for a in answers if a.correction in corrections).most_common(1)[0][0]
        if corrections
        else ""
    )
    if 2 * len(answers) <= each:
        return Verdict((), "unanswered", votes, text)
    if len(counts) > 1 and counts[0][1] == counts[1][1]:
        return Verdict((), "tie", votes, text)
    if counts[0][1] <= share * len(answers):
        return Verdict((), "low_agreement", votes, text)
    if counts[0][0] == NO and text:
        return Verdict((), "corrected", votes, text)
    return Verdict((counts[0][0],), "", votes, text)


def captions(
    key: Key, answers: Sequence[Answer], least: int, settings: Titles
) -> tuple[dict[str, Verdict], list[dict[str, str]]]:
    """Collect the captions of every clip: those that pass the checks, without near-duplicates.

    Args:
      key: of the sheets.
      answers: of all annotators, and of the adjudicator.
      least: different captions that a clip needs.
      settings: `min_length`, `min_chinese`, and when two captions are alike. Longer captions than titles are fine.

    Returns:
      (item -> verdict, refused answers with "why": "short", "not_chinese" or "duplicate of ...").
    """
    kept: dict[str, list[str]] = {name: [] for name in key.items}
    refused: list[dict[str, str]] = []
    for one in sorted(answers, key=lambda answer: (answer.annotator == ADJUDICATOR, answer)):
        text = clean(one.answer)
        if why := _unfit(text, kept[one.item], settings):
            refused.append({**one._asdict(), "why": why})
        else:
            kept[one.item].append(text)
    verdicts = {
        name: Verdict(tuple(own), "" if len(own) >= least else "few_captions", " | ".join(own))
        for name, own in kept.items()
    }
    return verdicts, refused


def _unfit(text: str, others: Sequence[str], settings: Titles) -> str:
    """Why a caption is refused, "" if it is not."""
    if len(graphemes(text)) < settings.min_length:
        return "short"
    if chinese_share(text) < settings.min_chinese:
        return "not_chinese"
    mine = print_of(text, settings)
    twins = ((other, print_of(other, settings)) for other in others)
    twin = next((other for other, its in twins if its.text == mine.text or alike(mine, its, settings)), "")
    return f"duplicate of {twin}" if twin else ""


def adjudicated(verdicts: Mapping[str, Verdict], answers: Sequence[Answer]) -> dict[str, Verdict]:
    """Replace verdicts by the answers of the adjudicator, which overrule.

    A yes to a corrected text takes that text; a correction by the adjudicator is taken in any case.
    """
    made = dict(verdicts)
    for one in answers:
        old = verdicts[one.item]
        asked = old.text if one.answer == YES and old.reason == "corrected" else ""
        made[one.item] = Verdict((one.answer,), votes=old.votes, text=one.correction or asked)
    return made
