"""Scores of the text of a title, and which of them are a reason to drop a clip.

    scorer = Scorer(settings)
    scores = scorer.scores("小猫打滚，加微信 abc12345")
    reason_of(scores, settings)  # "title_advert"

No score depends on other titles. What is counted over a whole corpus, or measured by a model, is an argument. Without it the score
is None, and None is never a reason: it means that the title was not checked.
"""

from pathlib import Path

import regex

from data_prep.curation import title_faults, title_words
from data_prep.curation.settings import Scores, Titles
from data_prep.curation.title_text import chinese_share, clean, compact, graphemes

# Reason -> meaning, in the order in which `reason_of` tries them.
REASONS = {
    "title_unreadable": "the title has characters of a broken encoding",
    "title_template": "the title is the name of an upload or of a file, a date or a hash",
    "title_short": "the title has too few characters",
    "title_not_chinese": "too few of the title's words are Chinese",
    "title_url": "the title has an address of the web or of mail",
    "title_phone": "the title has a telephone number",
    "title_advert": "the title is an advert or names an account to contact",
    "title_blocked": "the title has a phrase of the blocklist",
    "title_repeats": "a repeated character or phrase fills most of the title",
    "title_long": "the title has too many characters",
    "title_series": "too many titles differ from this one in numbers only",
    "title_perplexity": "the language model finds the title improbable",
}

LONGEST = 2000  # characters that are looked at; more are only counted
_BROKEN = regex.compile(
    r"[\ufffd\p{Co}\p{Cs}]|锟斤拷|烫烫烫|屯屯屯|(?:[ÃÂâãäåæçèé][\x80-\xbf\u2013-\u2122]{1,2}){2}|&(?:#\d+|#x[0-9a-f]+|amp|quot|nbsp|lt|gt);"
)


class Scorer:
    """Scores titles with the word lists of the settings, which are read once."""

    def __init__(self, settings: Titles):
        """Read the word lists.

        Raises:
          ValueError: a list is empty, damaged or not UTF-8; names the file and line.
          OSError: a list cannot be read.
        """
        adverts, uploads = settings.adverts, settings.upload_words
        self._adverts = title_words.read_adverts(Path(adverts) if adverts else title_words.FOLDER / "adverts.txt")
        words = title_words.read_words(Path(uploads) if uploads else title_words.FOLDER / "upload_words.txt")
        self._uploads = title_faults.upload_words(words)
        self._blocked = title_words.read_phrases(Path(settings.blocklist)) if settings.blocklist else None

    def scores(self, title: str, *, series: int | None = None, perplexity: float | None = None) -> Scores:
        """Score a title.

        Args:
          title: as it stands in the listing.
          series: how many titles of the corpus have the same `title_faults.template_key`; None: not counted.
          perplexity: of the title, see `data_prep.curation.perplexity`; None: not measured.

        Returns:
          title_length: characters, an emoji is one. title_chinese: share of Chinese words. title_broken, title_urls, title_phones:
          number found. title_adverts: phrases of adverts, see `title_words.Adverts.weight`. title_template: kind of upload name, or
          "". title_blocked: the phrase of the blocklist, "" without one, None without a list. title_run: longest run of one character.
          title_repeated: share that repeats what stands right before it. title_series, title_perplexity: the arguments.
        """
        whole = clean(title)
        text = whole[:LONGEST]
        letters = compact(text)
        blocked = self._blocked.search(letters) if self._blocked else None
        return {
            "title_length": float(len(graphemes(whole))),
            "title_chinese": chinese_share(text),
            "title_broken": float(len(_BROKEN.findall(title[:LONGEST]))),
            "title_urls": float(title_faults.urls(text)),
            "title_phones": float(title_faults.phones(text)),
            "title_adverts": self._adverts.weight(text, letters),
            "title_template": title_faults.template(text, self._uploads),
            "title_blocked": None if self._blocked is None else blocked[0] if blocked else "",
            "title_run": float(title_faults.longest_run(text)),
            "title_repeated": title_faults.repeated_share(letters),
            "title_series": None if series is None else float(series),
            "title_perplexity": perplexity,
        }


def reason_of(scores: Scores, settings: Titles) -> str:
    """Return the first reason of REASONS to drop a title with these scores, "" to keep it."""

    def number(name: str) -> float:
        value = scores[name]
        assert isinstance(value, float), name
        return value

    def above(name: str, limit: float) -> bool:
        return limit > 0 and scores[name] is not None and number(name) > limit

    found = {
        "title_unreadable": number("title_broken") > 0,
        "title_template": bool(scores["title_template"]),
        "title_short": number("title_length") < settings.min_length,
        "title_not_chinese": number("title_chinese") < settings.min_chinese,
        "title_url": number("title_urls") > 0,
        "title_phone": number("title_phones") > 0,
        "title_advert": number("title_adverts") >= 1,
        "title_blocked": bool(scores["title_blocked"]),
        "title_repeats": number("title_run") > settings.max_run or number("title_repeated") > settings.max_repeated,
        "title_long": number("title_length") > settings.max_length,
        "title_series": above("title_series", settings.max_series),
        "title_perplexity": above("title_perplexity", settings.max_perplexity),
    }
    return next((reason for reason in REASONS if found[reason]), "")
