"""The verdict on every row of a curation, and the files that tell it: decisions.parquet and the numbers of funnel.json.

Memory: a few numbers of each row, and the names of clips that have duplicates. The scores are read partition by partition.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from data_prep.curation import choice
from data_prep.curation.score_rows import MODEL_NAMES, NAMES, NOT_CHECKED, SCORES, read_scores, stages
from data_prep.curation.settings import Curation
from data_prep.raw_rows import FILE

STAGES = {**stages(), "duplicates": choice.DUPLICATES, "diversity": choice.DIVERSITY}
CODES = ["", *(reason for reasons in STAGES.values() for reason in reasons)]  # a row's code -> reason; 0: kept
STAGE_OF = {reason: stage for stage, reasons in STAGES.items() for reason in reasons} | {"": ""}
GROUP_ROWS = 65_536  # rows of a row group of decisions.parquet
DECISIONS = pa.schema(
    [
        (FILE, pa.string()), ("kept", pa.bool_()), ("stage", pa.string()), ("reason", pa.string()), ("cluster", pa.string()),
        *SCORES, ("sha256", pa.string()),
        *(field for name in MODEL_NAMES for field in ((name, pa.float64()), (f"{name}_checked", pa.string()))),
    ]
)  # fmt: skip


class Verdicts(NamedTuple):
    """What is decided about each row."""

    codes: np.ndarray  # int16[n], of CODES
    series: np.ndarray  # int64[n], titles that differ in numbers only
    draws: np.ndarray  # uint64[n], the sampling order
    clusters: dict[int, str]  # row -> id, of rows with duplicates


def decide(scores: epath.Path, partitions: int, pairs: np.ndarray, curation: Curation, target: int | None) -> Verdicts:
    """Decide about all rows.

    Args:
      scores: work folder with the scores of all partitions.
      partitions: their number.
      pairs: int64[p, 2], rows whose frames are alike.
      curation: settings.
      target: largest number of clips to keep; None: all.

    Raises:
      OSError: the scores cannot be read.
    """
    columns = ["media_id", "reason", "sha256", "series_key", "source_key", "width", "height", "seconds"]
    number_of = {reason: code for code, reason in enumerate(CODES)}
    parts: list[list[np.ndarray]] = []
    for i in range(partitions):
        table = read_scores(scores, i, columns).to_pydict()
        parts.append(
            [
                np.array([number_of[reason] for reason in table["reason"]], np.int16),
                np.array([int(digest[:16], 16) if digest else 0 for digest in table["sha256"]], np.uint64),
                np.array(table["series_key"], np.uint64),
                np.array(table["source_key"], np.uint64),
                np.array(
                    [(w or 0) * (h or 0) for w, h in zip(table["width"], table["height"], strict=True)], np.float32
                ),
                np.array([one or 0 for one in table["seconds"]], np.float64),
                np.array([choice.draw(curation.diversity.seed, name) for name in table["media_id"]], np.uint64),
            ]
        )
    codes, contents, series_keys, sources, areas, seconds, draws = map(np.concatenate, zip(*parts, strict=True))
    series = choice.series_counts(series_keys)
    if curation.titles.max_series:
        earlier = np.isin(
            codes,
            [number_of[reason] for reason in (*STAGES["metadata"], *STAGES["titles"]) if reason != "title_perplexity"],
        )
        codes[~earlier & (series > curation.titles.max_series)] = number_of["title_series"]
    found = choice.clusters(pairs, contents, codes == 0)
    names = list(_names(scores, partitions, found.rows))
    best = choice.representatives(found, names, areas[found.rows], seconds[found.rows])
    same = contents[found.rows] == contents[best]
    dropped = found.rows != best
    codes[found.rows[dropped & same]] = number_of["exact_duplicate"]
    codes[found.rows[dropped & ~same]] = number_of["near_duplicate"]
    if curation.diversity.max_per_source:
        over = choice.over_cap(codes == 0, sources, draws, curation.diversity.max_per_source)
        codes[over] = number_of["source_cap"]
    if target is not None:
        codes[choice.over_target(codes == 0, draws, target)] = number_of["not_sampled"]
    ids = choice.cluster_names(found, names)
    return Verdicts(codes, series, draws, dict(zip(found.rows.tolist(), ids, strict=True)))


def _names(scores: epath.Path, partitions: int, rows: np.ndarray) -> Iterator[str]:
    """Yield the names of some rows, ascending, reading only the partitions that have them."""
    start = 0
    for number in range(partitions if len(rows) else 0):
        count = read_scores(scores, number, ["number"]).num_rows
        mine = rows[(rows >= start) & (rows < start + count)] - start
        if len(mine):
            yield from read_scores(scores, number, ["media_id"]).column("media_id").take(pa.array(mine)).to_pylist()
        start += count


def write_decisions(scores: epath.Path, partitions: int, verdicts: Verdicts, file: Path) -> None:
    """Write decisions.parquet, every row in the order of the listing: equal verdicts give equal bytes. Raises OSError."""
    waiting, start = DECISIONS.empty_table(), 0
    with pq.ParquetWriter(file, DECISIONS, compression="zstd") as writer:
        for number in range(partitions):
            part = _decisions(read_scores(scores, number, ["media_id", *NAMES, "sha256"]), start, verdicts)
            start += len(part)
            waiting = pa.concat_tables([waiting, part])
            while len(waiting) >= GROUP_ROWS:
                writer.write_table(waiting.slice(0, GROUP_ROWS).combine_chunks(), row_group_size=GROUP_ROWS)
                waiting = waiting.slice(GROUP_ROWS)
        if len(waiting):
            writer.write_table(waiting.combine_chunks(), row_group_size=GROUP_ROWS)


def _decisions(table: pa.Table, start: int, verdicts: Verdicts) -> pa.Table:
    count, end = len(table), start + len(table)
    reasons = [CODES[code] for code in verdicts.codes[start:end].tolist()]
    columns: dict[str, Any] = {
        FILE: table.column("media_id"),
        "kept": [not reason for reason in reasons],
        "stage": [STAGE_OF[reason] for reason in reasons],
        "reason": reasons,
        "cluster": [verdicts.clusters.get(row) for row in range(start, end)],
        **{name: table.column(name) for name in (*NAMES, "sha256")},
        "title_series": verdicts.series[start:end].astype(np.float64),
    }
    for name in MODEL_NAMES:
        columns |= {name: [None] * count, f"{name}_checked": [NOT_CHECKED] * count}
    return pa.table(columns, DECISIONS)


def funnel(codes: np.ndarray) -> list[dict[str, Any]]:
    """Return for each stage the rows that reach it, those that survive it, and how many are dropped for each reason."""
    counts = dict(zip(CODES, np.bincount(codes, minlength=len(CODES)).tolist(), strict=True))
    left, made = len(codes), []
    for stage, meanings in STAGES.items():
        reasons = {reason: counts[reason] for reason in meanings if counts[reason]}
        survive = left - sum(reasons.values())
        made.append({"stage": stage, "rows": left, "kept": survive, "reasons": reasons})
        left = survive
    return made
