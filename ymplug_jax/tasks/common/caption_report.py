"""Scores and readable rows of generated captions, shared by the captioning tasks of all model families."""

from collections.abc import Callable, Sequence
from typing import Any

from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.records import Record, Split
from ymplug_jax.tasks.common import caption_metrics, task_metrics
from ymplug_jax.tasks.presentation import Score
from ymplug_jax.tasks.task import Row

SETTING = "config.options.language"


def checker(language: str) -> Callable[[Record], None]:
    """The `Task.scorable` of captioning in a language, the option `language` of the task.

    Raises:
      ValueError: The language is unknown.
    """
    if language not in caption_metrics.LANGUAGES:
        known = ", ".join(caption_metrics.LANGUAGES)
        raise ValueError(f"{SETTING}: unknown language {language!r}; choose one of {known}")
    return lambda record: check(record, record.media_id, language)


def scores_of(known: Sequence[Score], language: str) -> tuple[Score, ...]:
    """The scores that `report_of` may return in a language, of all that a captioning task knows."""
    return tuple(score for score in known if score.name != "meteor" or language == "zh")


def check(record: Record, name: str, language: str) -> None:
    """Check that a generated caption in the language could match every reference of a record.

    Raises:
      Mistake: A reference is not in the language; the message starts with `name`.
    """
    for reference in record.captions:
        if caption_metrics.counts(reference, language):
            continue
        if language == "zh":
            raise Mistake(
                f"{name}: the reference {reference!r} has no Chinese character, the only ones that the metrics count; if the "
                f'captions are English, set {SETTING}="en", otherwise remove it from the split'
            )
        raise Mistake(
            f"{name}: the reference {reference!r} has no Latin letter and no digit, so it is not English; if the captions are "
            f'Chinese, set {SETTING}="zh", otherwise remove it from the split'
        )


def report_of(
    said: list[str], rows: list[Row], records: Split, language: str = "zh"
) -> tuple[dict[str, object], list[dict[str, Any]]]:
    """Scores and readable rows of captions.

    As in the COCO toolkit, a clip counts once: the caption of its first row is scored against the references of all its rows.

    Args:
      said: The generated captions of N rows.
      rows: N rows; "index" is the position in the split.
      records: Records of the split.
      language: Language of the captions, one of `caption_metrics.LANGUAGES`.

    Returns:
      Scores, with "language" and perhaps a "note"; and one row for each clip.

    Raises:
      Mistake: A reference is not in the language, so no caption could match it; the message names the clip.
    """
    clips: dict[str, dict[str, Any]] = {}
    for text, row in zip(said, rows, strict=True):
        index = int(row["index"])
        record = records[index]
        check(record, task_metrics.example_name(row, records), language)
        own = {"index": index, "id": record.media_id, "caption": text, "references": []}
        clips.setdefault(record.media_id, own)["references"] += record.captions
    answers = list(clips.values())
    told = [answer for answer in answers if answer["references"]]
    count = sum(len(answer["references"]) for answer in told)
    found: dict[str, object] = {"language": language}
    found |= {"rows": len(rows), "clips": len(answers), "labelled": len(told), "references": count}
    if not told:
        return found | {"note": "this split has no captions: predictions are written, nothing is scored"}, answers
    captions = [answer["caption"] for answer in told]
    total, each = caption_metrics.score(captions, [answer["references"] for answer in told], language)
    for answer, values in zip(told, each, strict=True):
        answer |= values
    if notes := [*_notes(captions, language)]:
        found["note"] = "; ".join(notes)
    return found | total, answers


def _notes(captions: list[str], language: str) -> list[str]:
    """What a reader of the scores must know."""
    notes = []
    if len(captions) == 1:
        notes.append("only one clip has references: CIDEr is 0, because it weighs words by their rarity among clips")
    other = [caption for caption in captions if caption.strip() and not caption_metrics.counts(caption, language)]
    if other and not any(caption_metrics.counts(caption, language) for caption in captions):
        notes.append(
            f"no generated caption is in the language of the references ({SETTING}={language!r}), so all count as empty and score "
            f"0; the first is {other[0]!r:.60}"
        )
    if language == "en":
        notes.append(caption_metrics.NO_METEOR)
    return notes
