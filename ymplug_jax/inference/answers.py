"""What `ymplug_jax.predict` prints about a stream of clips: answers and rankings; and the sheet that shows their frames."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ymplug_jax.core import index_file
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.records import Record
from ymplug_jax.inference.clip_stream import File
from ymplug_jax.inference.index_build import Export
from ymplug_jax.inference.predictor import BATCH, Predictor
from ymplug_jax.inference.wording import readable, shown
from ymplug_jax.tasks.presentation import Answer

SHEET = 64  # largest number of clips on a sheet


def check_lengths(args: argparse.Namespace, predictor: Predictor) -> None:
    """Say which titles and texts to search for are longer than the model reads; in training they were cut as well.

    Raises:
      Mistake: a question is.
    """
    if args.command == "answer":
        predictor.check_questions(args.title, "--question")
        return
    for flag in ("title", "text"):
        for text, tokens, read in predictor.cut(getattr(args, flag) or []):
            print(
                f"--{flag} {shown(text)}: has {tokens} tokens; the model reads the first {read}, as in training",
                file=sys.stderr,
            )


def describe(args: argparse.Namespace, predictor: Predictor, reading: Any) -> Iterator[Answer]:
    """Yield the answer of the task about each readable file, in order.

    Raises:
      Mistake: predictions are not finite.
    """
    drawn: list[tuple[Record, str]] = []
    count, last = 0, ""
    for records in reading.records(reading.files, BATCH):
        for answer, record in zip(predictor.answers(args.command, records, args.best), records, strict=True):
            yield answer
            count, last = count + (record.media_id != last), record.media_id  # several questions may be about one clip
            if args.sheet and len(drawn) < SHEET:
                drawn.append((record, readable(answer)))
    draw(args, predictor, drawn, count)


def retrieve(args: argparse.Namespace, predictor: Predictor, reading: Any) -> Iterator[Answer]:
    """Yield rankings, and write the index if `--export` asks for it.

    Raises:
      Mistake: the index or the partial export comes from other weights, or vectors are not finite.
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
        files = _to_read(args, reading.files, export)
        at_once = args.rank == "texts" and not export
        pool: dict[str, Record] = {}
        for records in reading.records(files, BATCH):
            found = predictor.embed_records(records)
            new = {record.media_id: vector for record, vector in zip(records, found, strict=True)}
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
            export.finish(names)
            if names:
                print(f"index of {len(names)} videos: {args.export}", file=sys.stderr)
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


def _to_read(args: argparse.Namespace, files: list[File], export: Export | None) -> list[File]:
    """The files whose vectors the export lacks. Vectors of changed files are dropped from it."""
    if not export:
        return files
    export.drop([file.name for file in files if not export.has(file.name)])
    # A sheet needs the frames of all files, and an export keeps vectors only.
    wanted = [file for file in files if args.sheet or not export.has(file.name)]
    if len(wanted) < len(files):
        print(f"{export.part}: {len(files) - len(wanted)} videos are already exported", file=sys.stderr)
    return wanted


def _from_index(
    args: argparse.Namespace, predictor: Predictor, origin: index_file.Origin
) -> tuple[list[str], np.ndarray]:
    """(names, f32[N, E]) of the index to search."""
    arrays = index_file.read(args.index, ("video", "video_id"), setting="--index")
    index_file.check_origin(args.index, arrays, origin, str(predictor.folder))
    names, vectors = [str(name) for name in arrays["video_id"]], arrays["video"]
    if vectors.ndim != 2 or len(vectors) != len(names) or not names:
        raise Mistake(
            f"{args.index}: --index has {len(names)} names and vectors of shape {vectors.shape}; export it again"
        )
    return names, vectors


def _texts(args: argparse.Namespace, predictor: Predictor) -> np.ndarray:
    """f32[texts, E] of `--text`, computed once."""
    if not args.text:
        return np.zeros((0, 1), np.float32)
    if not hasattr(args, "text_vectors"):
        args.text_vectors = predictor.embed_texts(args.text)
    return args.text_vectors


def _rank(args: argparse.Namespace, texts: np.ndarray, vectors: np.ndarray, names: list[str]) -> Iterator[Answer]:
    """Rank the videos for each text, or the texts for each video. Equal scores keep the order given."""
    if not args.text:
        return
    if texts.shape[1] != vectors.shape[1]:
        raise Mistake(
            f"{args.index}: --index has vectors of width {vectors.shape[1]}, this run computes {texts.shape[1]}; export it again"
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
    """The `names` whose frames the sheet may need, given the videos so far."""
    if not args.text or args.rank == "texts":
        return names[:SHEET]
    scores = _texts(args, predictor) @ np.stack([vectors[name] for name in names]).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, : min(args.best, SHEET)]
    return [names[i] for i in sorted(set(best.ravel().tolist()))]


def _drawn(args: argparse.Namespace, answers: list[Answer], pool: dict[str, Record]) -> list[tuple[Record, str]]:
    """(clip, text of the sheet): the best videos of each text, or each video with its best texts."""
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
    """Draw the sheet if `--sheet` asks for it and a clip was read, and print how many of `count` clips it shows."""
    if not args.sheet or not drawn:
        return
    from ymplug_jax.reports import contact_sheet

    drawn = drawn[:SHEET]
    records, texts = zip(*drawn, strict=True)
    contact_sheet.draw(args.sheet, list(records), list(texts), predictor.experiment.data.frames)
    clips = len({record.media_id for record in records})
    print(f"frames: {args.sheet}" + (f" ({clips} of {count} clips)" if clips < count else ""), file=sys.stderr)
