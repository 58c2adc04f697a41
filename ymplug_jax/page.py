"""An evaluation as one self-contained HTML page: scores, confusion matrix, examples with their frames, retrieval grids."""

import base64
import re
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import jinja2
import numpy as np

SHOWN = 12  # examples of a kind
FRAMES = 4  # of a clip
HEIGHT = 96  # pixels of a frame on the page


def write(path: Path, scores: dict[str, Any], rows: list[dict], records: Any) -> None:
    """Write the page.

    Args:
      path: of the HTML file.
      scores: name -> value; names with a slash are grouped by what stands before it.
      rows: readable predictions. What a row holds decides what is drawn: label and predicted (confusion matrix), caption
        and references, text and retrieved_index (grid), title and generated.
      records: the split, for the frames; rows name their record by "index".
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("page.html")
    pictures = _Pictures(records)
    kind = _kind(rows)
    sections = [(title, [_shown(row, kind, pictures) for row in part]) for title, part in _choose(rows, kind)]
    matrix = _confusion(rows) if kind == "classes" else None
    html = template.render(
        kind=kind, scores=_table(scores), sections=[s for s in sections if s[1]], matrix=matrix, facts=_facts(scores)
    )
    path.write_text(html, encoding="utf-8")


class _Pictures:
    """Frames of records as data URIs."""

    def __init__(self, records: Any):
        self._records = records

    def of(self, index: int, count: int = FRAMES) -> list[str]:
        stored = self._records[index].frames
        places = np.linspace(0, len(stored) - 1, 2 * count + 1).round().astype(int)[1::2]  # the middles
        return [_small(stored[place]) for place in places]


def _small(jpeg: bytes) -> str:
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    height, width = image.shape[:2]
    image = cv2.resize(image, (max(1, round(width * HEIGHT / height)), HEIGHT), interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def _kind(rows: list[dict]) -> str:
    first = rows[0] if rows else {}
    for kind, key in (
        ("classes", "predicted"),
        ("captions", "caption"),
        ("grid", "retrieved_index"),
        ("titles", "generated"),
    ):
        if key in first:
            return kind
    return "plain"


def _choose(rows: list[dict], kind: str) -> list[tuple[str, list[dict]]]:
    """Which examples stand on the page, under which heading."""
    if kind == "classes":
        known = [row for row in rows if row["label"]]
        wrong = [row for row in known if row["label"] != row["predicted"]]
        right = [row for row in known if row["label"] == row["predicted"]]
        unknown = [row for row in rows if not row["label"]]
        return [("Wrong", wrong[:SHOWN]), ("Right", right[:SHOWN]), ("Without a label", unknown[:SHOWN])]
    if kind == "captions":
        told = sorted((row for row in rows if "cider" in row), key=lambda row: row["cider"])
        rest = [row for row in rows if "cider" not in row]
        best = told[SHOWN:][::-1][:SHOWN]
        return [("Lowest CIDEr", told[:SHOWN]), ("Highest CIDEr", best), ("Without references", rest[:SHOWN])]
    if kind == "grid":
        missed = sorted((row for row in rows if row["t2v_rank"] > 1), key=lambda row: -row["t2v_rank"])
        found = [row for row in rows if row["t2v_rank"] == 1]
        return [("Text to video, not first", missed[:SHOWN]), ("Text to video, first", found[:SHOWN])]
    if kind == "titles":
        wrong = [row for row in rows if row["title"] != row["generated"]]
        right = [row for row in rows if row["title"] == row["generated"]]
        return [("Other than the true title", wrong[:SHOWN]), ("Right to the last character", right[:SHOWN])]
    return []


def _shown(row: dict, kind: str, pictures: _Pictures) -> dict:
    if kind != "grid":
        return row | {"frames": pictures.of(row["index"])}
    best = zip(row["retrieved"][:5], row["retrieved_index"][:5], strict=True)
    clips = [{"id": name, "frame": pictures.of(index, 1)[0], "right": name == row["id"]} for name, index in best]
    return row | {"clips": clips, "frames": pictures.of(row["index"], 1)}


def _confusion(rows: list[dict]) -> dict:
    """Rows: true classes that occur; columns: classes that were answered. Cells with their share of the row."""
    pairs = Counter((row["label"], row["predicted"]) for row in rows if row["label"])
    names = sorted({label for label, _ in pairs}, key=lambda name: -sum(n for (a, _), n in pairs.items() if a == name))
    answers = names + sorted({answer for _, answer in pairs} - set(names))
    totals = {name: sum(n for (a, _), n in pairs.items() if a == name) for name in names}
    cells = [[(pairs[name, answer], pairs[name, answer] / totals[name]) for answer in answers] for name in names]
    return {"names": names, "answers": answers, "cells": list(zip(names, cells, strict=True))}


def _facts(scores: dict[str, Any]) -> dict[str, Any]:
    return {
        key: scores[key] for key in ("task", "split", "step", "examples", "labelled", "search", "note") if key in scores
    }


def _table(scores: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Group -> name -> value as it is shown."""
    groups: dict[str, dict[str, str]] = {}
    for key, value in scores.items():
        if isinstance(value, float):
            group, _, name = key.rpartition("/")
            if direction := re.match(r"(v2t|t2v)_", name):  # retrieval: a table for each direction
                group, name = f"{group} {direction[1]}".strip(), name.removeprefix(direction[0])
            groups.setdefault(group, {})[name] = f"{value:.4g}"
    return groups
