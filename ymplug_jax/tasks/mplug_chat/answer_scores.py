"""Scores of judged answers: overall, by kind of question, under the controls, and of the best answer that sees no media."""

from collections.abc import Mapping, Sequence
from typing import Any

from ymplug_jax.tasks.common import caption_metrics, open_answers, scores
from ymplug_jax.tasks.mplug_chat.questions import BLACK, CONTROLS, OTHER
from ymplug_jax.tasks.presentation import Score

VERDICTS = ("exact", "contains", "choice", "choice_total")
MEDIA, MAJORITY, UNIFORM = "media", "majority", "uniform"
GROUPS = {
    MEDIA: "questions with media",
    BLACK: f"the same with {CONTROLS[BLACK]}",
    OTHER: f"the same with {CONTROLS[OTHER]}",
    MAJORITY: "most frequent answer of each kind",
    UNIFORM: "uniform guess",
}
LABELS = {"choice": "choice (mean log-probability)", "choice_total": "choice (summed log-probability)"}


def known() -> tuple[Score, ...]:
    """Every score that `of` may return, in display order."""
    base = (*(Score(name, LABELS.get(name, name), "", "%", 100) for name in VERDICTS), *scores.captions())
    made = list(base)
    for end in (MEDIA, BLACK, OTHER):
        better = True if end == MEDIA else None
        made += [
            score._replace(name=f"{score.name}/{end}", group=GROUPS[end], higher_is_better=better) for score in base
        ]
    for name, end in (("exact", MAJORITY), ("choice", MAJORITY), ("choice", UNIFORM)):
        made.append(Score(f"{name}/{end}", name, GROUPS[end], "%", 100, None))
    return tuple(made)


def of(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of judged answers, the readable rows of `answering.report`.

    Returns:
      Counts; the shares of `VERDICTS`, and the caption metrics of the questions whose references have Chinese characters; the same
      names followed by "/media" (questions with media), "/black" and "/other"; "exact/majority", "choice/majority" and
      "choice/uniform" of the questions with media; and under "kinds" the shares of each kind of question. A score for which no
      question counts is left out.
    """
    seen = [answer for answer in answers if answer["media"]]
    swapped = [answer for answer in seen if f"answer/{OTHER}" in answer]
    found: dict[str, Any] = {"questions": len(answers), "text_only": len(answers) - len(seen)}
    found |= _shares(answers) | _captions(answers, "")
    for end, some in ((MEDIA, seen), (BLACK, seen), (OTHER, swapped)):
        found |= _captions(some, f"/{end}")
    kinds = {kind: [one for one in answers if one["kind"] == kind] for kind in sorted({a["kind"] for a in answers})}
    found["kinds"] = {kind: {"questions": len(some), **_shares(some)} for kind, some in kinds.items()}
    notes = []
    if not answers:
        notes.append("no question of this split has an answer and fits: nothing is scored")
    if len(seen) > len(swapped):
        notes.append(
            f"{len(seen) - len(swapped)} questions have no other clip to be asked about and no control with one"
        )
    if answers and "bleu1" not in found:
        notes.append("no right answer has a Chinese character: caption metrics are left out")
    if notes:
        found["note"] = "; ".join(notes)
    return found


def _shares(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    seen = [answer for answer in answers if answer["media"]]
    found: dict[str, float | None] = {}
    for name in VERDICTS:
        found[name] = open_answers.mean(answer.get(name) for answer in answers)
        found[f"{name}/{MEDIA}"] = open_answers.mean(answer.get(name) for answer in seen)
        for end in CONTROLS:
            found[f"{name}/{end}"] = open_answers.mean(answer.get(f"{name}/{end}") for answer in seen)
    found[f"exact/{MAJORITY}"] = _by_kind(seen)
    choosing = [answer for answer in seen if "choice" in answer]
    found[f"choice/{MAJORITY}"] = _by_kind(choosing)
    found[f"choice/{UNIFORM}"] = open_answers.mean(_guess(answer) for answer in choosing)
    return {name: value for name, value in found.items() if value is not None}


def _by_kind(answers: Sequence[Mapping[str, Any]]) -> float | None:
    """Share of the questions that the most frequent answer of their kind is right for."""
    right = 0.0
    for kind in {answer["kind"] for answer in answers}:
        own = [answer["references"] for answer in answers if answer["kind"] == kind]
        right += open_answers.majority(own)[1] * len(own)
    return right / len(answers) if answers else None


def _guess(answer: Mapping[str, Any]) -> float:
    """Probability that a uniform guess among the options is right."""
    right = {open_answers.normal(text) for text in answer["references"]}
    return sum(open_answers.normal(text) in right for text in answer["options"]) / len(answer["options"])


def _captions(answers: Sequence[Mapping[str, Any]], end: str) -> dict[str, float]:
    """Caption metrics of the answers of one run, named with `end`; empty where no reference has a Chinese character."""
    said, references = [], []
    key = f"answer{'' if end == f'/{MEDIA}' else end}"
    for answer in answers:
        chinese = [text for text in answer["references"] if caption_metrics.counts(text, "zh")]
        if chinese and key in answer:
            said.append(answer[key])
            references.append(chinese)
    if not said:
        return {}
    return {f"{name}{end}": value for name, value in caption_metrics.score(said, references)[0].items()}
