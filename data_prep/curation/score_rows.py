"""Scores of single rows: the stages of a curation that look at one title or one clip, and the table that holds what they find.

The stages run in the order of their cost: titles and containers of all rows, pictures only of rows that both keep. What a row is dropped
for is decided in the order of STAGES.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from data_prep.curation import content, metadata, prints, title_prints, titles
from data_prep.curation.perplexity import perplexity_of
from data_prep.curation.settings import Curation
from data_prep.curation.title_faults import template_key
from data_prep.curation.title_text import clean
from data_prep.part_files import part_name
from data_prep.raw_rows import RawRow
from data_prep.row_table import RAW
from data_prep.videos import open_videos
from ymplug_jax.core import places
from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_file import Reader

BAD_ROW = "bad_row"
FILES = ".parquet"  # suffix of the files of a partition, in the work folder
NOT_CHECKED = "not checked"
TITLE_NAMES = (
    "title_length", "title_chinese", "title_broken", "title_urls", "title_phones", "title_adverts", "title_template", "title_blocked",
    "title_run", "title_repeated", "title_series", "title_perplexity",
)  # fmt: skip
# Scores that no stage without a model has. The column `..._checked` says so.
MODEL_NAMES = ("consistency", "safety")
TEXTS = frozenset(("problem", "problem_detail", "container", "title_template", "title_blocked", "decoding"))
NAMES = (*metadata.NAMES, *TITLE_NAMES, *content.NAMES)
SCORES = [(name, pa.string() if name in TEXTS else pa.float64()) for name in NAMES]
# What later steps need, and no decision shows. `order` sorts clips so that alike ones are near each other.
SEARCH = [
    ("series_key", pa.uint64()), ("source_key", pa.uint64()), ("keys", pa.list_(pa.uint64())), ("order", pa.uint64()),
    ("signs", pa.binary()), ("strong", pa.binary()), ("weight", pa.binary()),
]  # fmt: skip
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("media_id", pa.string()),
        ("reason", pa.string()),
        *SCORES,
        ("sha256", pa.string()),
        *SEARCH,
    ]
)
TITLE_BIT = 1 << 63  # tells keys of titles from those of frames


class Scoring(NamedTuple):
    """Settings of the job that scores rows."""

    curation: Curation
    allow_links_to: tuple[str, ...] = ()
    archive_index: str = ""
    kind: str = RAW


def key_of(text: str) -> int:
    """Return a 64-bit key of a text, the same in every process; 0 for an empty text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") if text else 0


class RowScorer:
    """Scores the rows of partitions, one partition after the other, in one process."""

    def __init__(self, scoring: Scoring, video_root: str):
        """Read the word lists. Raises ValueError, OSError."""
        self._settings = scoring.curation
        limit = max(self._settings.metadata.time_limit, self._settings.content.time_limit)
        self._videos = open_videos(video_root, scoring.allow_links_to, limit, scoring.archive_index)
        self._titles = titles.Scorer(self._settings.titles)
        self._perplexity = perplexity_of(self._settings.titles)
        self._probe, self._look = Reader(self._settings.metadata.time_limit), Reader(self._settings.content.time_limit)

    def close(self) -> None:
        """Stop the decoders."""
        self._probe.close()
        self._look.close()
        self._videos.close()

    def table(self, rows: Sequence[RawRow], tell: Callable[[int], None]) -> pa.Table:
        """Score rows, and call `tell` with the number of those that are done. Raises OSError, DecoderFailed."""
        found: list[float | None] = [None] * len(rows)
        if self._perplexity is not None:
            found = self._perplexity([row.title for row in rows])
        made = []
        for done, (row, perplexity) in enumerate(zip(rows, found, strict=True)):
            tell(done)
            made.append(self._row(row, perplexity))
        return pa.Table.from_pylist(made, SCHEMA)

    def _row(self, row: RawRow, perplexity: float | None) -> dict[str, Any]:
        settings = self._settings
        title = self._titles.scores(row.title, perplexity=perplexity)
        found: dict[str, Any] = {
            "number": row.number, "media_id": row.media_id, "source_key": key_of(row.source),
            "series_key": key_of(template_key(clean(row.title))), **dict.fromkeys(content.NAMES), **title,
        }  # fmt: skip
        if row.problem:
            return found | metadata.scores_of(Reject(BAD_ROW, row.problem)) | {"reason": BAD_ROW}
        try:
            with self._videos.file(row.media_id) as path:
                known = self._asked(self._probe, metadata.measure, path)
                scores = metadata.scores_of(known)
                reason = metadata.reason_of(scores, settings.metadata) or titles.reason_of(title, settings.titles)
                if not reason:
                    looked = self._asked(self._look, content.look, path, settings.content, settings.duplicates)
                    scores |= content.scores_of(looked)
                    reason = content.reason_of(scores, settings.content)
                    found["sha256"] = _sha256(path)
                    if not reason:
                        found |= self._search(row.title, looked.print)
        except Reject as reject:
            scores = metadata.scores_of(reject)
            reason = metadata.reason_of(scores, settings.metadata)
        return found | {name: _plain(value) for name, value in scores.items()} | {"reason": reason}

    @staticmethod
    def _asked(reader: Reader, function: Callable[..., Any], path: Path, *arguments: Any) -> Any:
        try:
            return reader.ask(function, path, *arguments)
        except Reject as reject:
            return reject

    def _search(self, title: str, one: prints.Print) -> dict[str, Any]:
        """Return what near-duplicates of a clip are found and compared by."""
        words = title_prints.print_of(title, self._settings.titles).keys
        keys = prints.keys(one) + [int(word.split(":")[1], 16) | TITLE_BIT for word in words]
        order = int(min(one.signs[0, 0, 0], one.signs[0, 0, 0] ^ prints.ODD[0])) if len(one.weight) else 0
        arrays = {"signs": one.signs, "strong": one.strong, "weight": one.weight}
        return {"keys": sorted(set(keys)), "order": order, **{name: array.tobytes() for name, array in arrays.items()}}


def _plain(value: Any) -> Any:
    """Return a score that UTF-8 can hold: names of files may hold bytes that are no text."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_bytes(table: pa.Table) -> bytes:
    """Return a table as a Parquet file: equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read_scores(work: epath.Path, number: int, columns: list[str] | None = None) -> pa.Table:
    """Read the scores of a partition. Raises OSError."""
    file = work / part_name(number, FILES)
    try:
        return pq.read_table(io.BytesIO(places.read_bytes(file)), columns=columns)
    except pa.ArrowException as error:
        raise OSError(f"{file}: damaged ({error}); delete the folder and run again") from None


def print_from(row: dict[str, Any]) -> prints.Print | None:
    """Return the print of a row of the table, without what only its keys are made of; None: it has none."""
    if not row["weight"]:
        return None
    shape = (-1, len(prints.VIEWS), prints.WORDS)
    signs, strong = (np.frombuffer(row[name], np.uint64).reshape(shape) for name in ("signs", "strong"))
    weak = np.zeros((len(signs), len(prints.BANDS), prints.WEAK), np.uint64)
    return prints.Print(float(row["seconds"]), signs, strong, weak, np.frombuffer(row["weight"], np.float32))


def stages() -> dict[str, dict[str, str]]:
    """Return the reasons of the stages that score single rows, {stage: {reason: meaning}}, in the order in which they decide."""
    bad = {BAD_ROW: "the row has invalid text, or its fields are wrong in number"}
    return {"metadata": bad | metadata.REASONS, "titles": titles.REASONS, "content": content.REASONS}
