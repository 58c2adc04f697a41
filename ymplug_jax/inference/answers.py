"""Answers of one run about a stream of clips: what its task says about each, rankings, and the sheet that shows their frames."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Protocol

import jax
import numpy as np

from ymplug_jax.core import index_file
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.records import Record
from ymplug_jax.inference.clip_stream import File
from ymplug_jax.inference.index_build import Export
from ymplug_jax.inference.predictor import BATCH, Predictor, blank
from ymplug_jax.inference.wording import readable, shown
from ymplug_jax.tasks.presentation import Answer

SHEET = 64  # clips on a sheet at most


class Reading(Protocol):
    """The files of a command on their way in."""

    files: list[File]  # all of them

    def records(self, files: Sequence[File], size: int) -> Iterator[list[Record]]:
        """Records of `files` that can be read, in order, in lists of `size` at most."""
        ...


def describe(args: argparse.Namespace, predictor: Predictor, reading: Reading) -> Iterator[Answer]:
    """The answer of the run's task about each file that can be read, in order.

    Raises:
      Mistake: predictions that are not finite.
    """
    about = predictor.task.describe[args.command]
    drawn: list[tuple[Record, str]] = []
    count = 0
    for records in reading.records(reading.files, BATCH):
        for row, record in zip(predictor.rows(records), records, strict=True):
            for values in row.values():
                if jax.numpy.issubdtype(values.dtype, np.floating):
                    _finite(values, record.media_id)
            answer = about(row, record, args.best)
            yield answer
            count += 1
            if args.sheet and len(drawn) < SHEET:
                drawn.append((record, readable(answer)))
    draw(args, predictor, drawn, count)


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if not np.isfinite(values).all():
        raise Mistake(
            f"{shown(name)}: the model's scores are not finite; this checkpoint is broken, take an earlier one"
        )
    return values


def retrieve(args: argparse.Namespace, predictor: Predictor, reading: Reading) -> Iterator[Answer]:
    """Rankings; writes the index where asked.

    Raises:
      Mistake: an index, or partial results of an export, that this run did not compute; vectors that are not finite.
      PlaceFailed: the index cannot be written.
    """
    origin = index_file.origin(predictor.experiment, str(predictor.folder))
    if args.index:
        names, indexed = _from_index(args, predictor, origin)
        yield from _rank(args, _texts(args, predictor), indexed, names)
        return
    export = Export(args.export, origin) if args.export else None
    try:
        vectors: dict[str, np.ndarray] = export.vectors if export else {}
        files = _still_to_read(args, reading, export) if export else reading.files
        at_once = args.rank == "texts" and not export
        pool: dict[str, Record] = {}
        for records in reading.records(files, BATCH):
            rows = zip(predictor.rows(records), records, strict=True)
            new = {record.media_id: _finite(row["video"], record.media_id) for row, record in rows}
            vectors |= new
            if export:
                export.add(new)
            if at_once:
                yield from _rank(args, _texts(args, predictor), np.stack(list(new.values())), list(new))
            if args.sheet:
                pool |= {record.media_id: record for record in records}
                pool = {name: pool[name] for name in _to_draw(args, predictor, vectors, list(pool))}
        names = [file.name for file in reading.files if file.name in vectors]
        if export:
            _finish(args, export, names)
    finally:
        if export:
            export.close()
    if not names:
        return
    answers = list(_rank(args, _texts(args, predictor), np.stack([vectors[name] for name in names]), names))
    if not at_once:
        yield from answers
    if args.sheet:
        draw(args, predictor, _drawn(args, answers, pool), len(names))


def _still_to_read(args: argparse.Namespace, reading: Reading, export: Export) -> Sequence[File]:
    """The files whose vectors an earlier start of the export did not leave; all of them for a sheet, whose frames it did not keep."""
    missing = [file for file in reading.files if not export.has(file.name)]
    export.drop([file.name for file in missing])
    if args.sheet:
        return reading.files
    if len(missing) < len(reading.files):
        print(f"{export.part}: {len(reading.files) - len(missing)} videos are there already", file=sys.stderr)
    return missing


def _finish(args: argparse.Namespace, export: Export, names: list[str]) -> None:
    """The whole index under its name."""
    export.finish(names)
    if names:
        print(f"index of {len(names)} videos: {args.export}", file=sys.stderr)


def _from_index(
    args: argparse.Namespace, predictor: Predictor, origin: index_file.Origin
) -> tuple[list[str], np.ndarray]:
    """(names, f32[N, E]) of the index that is searched."""
    arrays = index_file.read(args.index, ("video", "video_id"), setting="--index")
    index_file.check_origin(args.index, arrays, origin, str(predictor.folder))
    names, vectors = [str(name) for name in arrays["video_id"]], arrays["video"]
    if vectors.ndim != 2 or len(vectors) != len(names) or not names:
        raise Mistake(
            f"{args.index}: --index holds {len(names)} names and vectors of shape {vectors.shape}; export it again"
        )
    return names, vectors


def _texts(args: argparse.Namespace, predictor: Predictor) -> np.ndarray:
    """f32[texts, E] of the questions; they are computed once."""
    if not args.text:
        return np.zeros((0, 1), np.float32)
    if not hasattr(args, "text_vectors"):
        rows = predictor.rows([blank(text) for text in args.text])
        args.text_vectors = np.stack([_finite(row["text"], text) for row, text in zip(rows, args.text, strict=True)])
    return args.text_vectors


def _rank(args: argparse.Namespace, texts: np.ndarray, vectors: np.ndarray, names: list[str]) -> Iterator[Answer]:
    """The best videos of each text, or the best texts of each video; equal scores stay in the order given."""
    if not args.text:
        return
    if texts.shape[1] != vectors.shape[1]:
        raise Mistake(
            f"{args.index}: vectors of width {vectors.shape[1]}, this run has {texts.shape[1]}; export it again"
        )
    scores = texts @ vectors.T  # [texts, videos]
    asked, given, key = (args.text, names, "text") if args.rank == "videos" else (names, args.text, "video")
    for question, line in zip(asked, scores if args.rank == "videos" else scores.T, strict=True):
        order = np.argsort(-line, kind="stable")[: args.best]
        ranking = [[given[i], round(float(line[i]), 4)] for i in order]
        places = (f"   {place}. {name}  ({score:+.3f})" for place, (name, score) in enumerate(ranking, 1))
        yield Answer({key: question, "ranking": ranking}, (question, *places))


def _to_draw(
    args: argparse.Namespace, predictor: Predictor, vectors: dict[str, np.ndarray], names: list[str]
) -> list[str]:
    """Those of `names` whose frames the sheet may need, given what was seen so far."""
    if not args.text or args.rank == "texts":
        return names[:SHEET]
    scores = _texts(args, predictor) @ np.stack([vectors[name] for name in names]).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, : min(args.best, SHEET)]
    return [names[i] for i in sorted(set(best.ravel().tolist()))]


def _drawn(args: argparse.Namespace, answers: list[Answer], pool: dict[str, Record]) -> list[tuple[Record, str]]:
    """(clip, text below it): of each question its best videos, of each video its best texts."""
    if not args.text:
        return [(record, shown(name)) for name, record in pool.items()]
    if args.rank == "texts":
        return [(pool[answer.json["video"]], readable(answer)) for answer in answers if answer.json["video"] in pool]
    return [
        (pool[name], f"{shown(answer.json['text'])}\n   {place}. {shown(name)}  ({score:+.3f})")
        for answer in answers
        for place, (name, score) in enumerate(answer.json["ranking"], 1)
    ]


def draw(args: argparse.Namespace, predictor: Predictor, drawn: Sequence[tuple[Record, str]], count: int) -> None:
    """The sheet, where asked for and anything was read; says how many of `count` clips it shows."""
    if not args.sheet or not drawn:
        return
    from ymplug_jax.reports import contact_sheet

    drawn = drawn[:SHEET]
    records, texts = zip(*drawn, strict=True)
    contact_sheet.draw(args.sheet, list(records), list(texts), predictor.experiment.data.frames)
    clips = len({record.media_id for record in records})
    print(f"frames: {args.sheet}" + (f" ({clips} of {count} clips)" if clips < count else ""), file=sys.stderr)
