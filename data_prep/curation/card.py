"""The data card of a curation: one HTML page without a network, with the funnel, histograms and sample frames of every reason."""

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pyarrow.parquet as pq

from data_prep.annotation.sheet_page import STORED, thumbnail
from data_prep.curation.decisions import STAGES
from data_prep.raw_rows import FILE
from data_prep.video_frames import Reader, Reject
from data_prep.videos import Videos

SAMPLES, KEPT_SAMPLES, SHOWN = 4, 12, 3  # clips of a reason, of those kept, and frames of a clip
BINS = 20


class Bar(NamedTuple):
    """A bin of a histogram: heights are shares of the highest bar."""

    low: str
    high: str
    rows: int
    kept: int
    height: float
    kept_height: float


def histogram(values: np.ndarray, kept: np.ndarray) -> list[Bar]:
    """Return the bins between the smallest value and the 99th percentile; the last one has what is above.

    Args:
      values: float[n], not a number where unknown.
      kept: bool[n].
    """
    known = ~np.isnan(values)
    values, kept = values[known], kept[known]
    if not len(values):
        return []
    low, high = float(values.min()), float(np.percentile(values, 99))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    at = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, BINS - 1)
    counts, kept_counts = np.bincount(at, minlength=BINS), np.bincount(at[kept], minlength=BINS)
    most = max(int(counts.max()), 1)
    return [
        Bar(f"{edges[i]:.4g}", f"{edges[i + 1]:.4g}", int(n), int(k), 100 * n / most, 100 * k / most)
        for i, (n, k) in enumerate(zip(counts, kept_counts, strict=True))
    ]


def render(funnel: dict[str, Any], decisions: Path, draws: np.ndarray, videos: Videos, seconds: float) -> str:
    """Return the page.

    Args:
      funnel: content of funnel.json.
      decisions: decisions.parquet, a local file.
      draws: uint64[n], the order in which samples are taken.
      videos: the video root.
      seconds: time limit for decoding a clip.

    Raises:
      OSError: the decisions or the video root cannot be read.
    """
    columns = ["kept", "seconds", "title_length", "width", "height"]
    table = pq.read_table(decisions, columns=columns)
    numbers = {name: table.column(name).to_numpy() for name in columns}
    kept = numbers["kept"].astype(bool)
    sides = np.fmin(numbers["width"].astype(float), numbers["height"].astype(float))
    charts = [
        ("Duration, seconds", histogram(numbers["seconds"].astype(float), kept)),
        ("Length of the title, characters", histogram(numbers["title_length"].astype(float), kept)),
        ("Resolution, shorter side in pixels", histogram(sides, kept)),
    ]
    samples = _samples(decisions, draws)
    reader = Reader(seconds)
    try:
        grids = [
            {
                "reason": reason or "kept",
                "stage": stage,
                "meaning": meaning,
                "clips": [
                    {"file": file, "note": note, "frames": _frames(file, videos, reader)}
                    for file, note in samples[reason]
                ],
            }
            for stage, reason, meaning in _all_reasons()
            if samples[reason]
        ]
    finally:
        reader.close()
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return made.get_template("data_card.html").render(funnel=funnel, charts=charts, grids=grids)


def _all_reasons() -> list[tuple[str, str, str]]:
    dropped = [(stage, reason, meaning) for stage, table in STAGES.items() for reason, meaning in table.items()]
    return [("", "", "no stage drops the clip"), *dropped]


def _samples(decisions: Path, draws: np.ndarray) -> dict[str, list[tuple[str, str]]]:
    """Return the (file, note) of the first clips of each reason in the order of `draws`."""
    found: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
    row = 0
    with pq.ParquetFile(decisions) as file:
        for batch in file.iter_batches(65_536, columns=[FILE, "reason", "cluster", "problem_detail", "decoding"]):
            for one in batch.to_pylist():
                note = (
                    one["problem_detail"] or one["decoding"] or (f"cluster {one['cluster']}" if one["cluster"] else "")
                )
                found[one["reason"]].append((int(draws[row]), one[FILE], note))
                row += 1
            for reason, clips in found.items():
                found[reason] = sorted(clips)[: SAMPLES if reason else KEPT_SAMPLES]
    return defaultdict(list, {reason: [(name, note) for _, name, note in clips] for reason, clips in found.items()})


def _frames(file: str, videos: Videos, reader: Reader) -> list[str]:
    """Return data URIs of frames of a clip, none if it cannot be read."""
    try:
        with videos.file(file) as path:
            clip = reader.read(path, STORED)
    except Reject:
        return []
    chosen = sorted({(2 * i + 1) * clip.decoded // (2 * SHOWN) for i in range(SHOWN)})
    return [thumbnail(clip.frames[i]) for i in chosen]
