"""Answers about video files from a run's checkpoint.

    python -m ymplug_jax.predict classify --checkpoint RUN --video clip.mp4 [--title TEXT]
    python -m ymplug_jax.predict caption  --checkpoint RUN --video clip.mp4 other.mkv
    python -m ymplug_jax.predict retrieve --checkpoint RUN --video FOLDER --text "红色的圆形" [--export index.npz]
    python -m ymplug_jax.predict retrieve --checkpoint RUN --index index.npz --text "红色的圆形"
    python -m ymplug_jax.predict retrieve --checkpoint RUN --video clip.mp4 --text TEXT TEXT ... --rank texts

Files are decoded as data_prep does, so that a model sees what it was trained on. `--json` prints one JSON object a line,
`--sheet FILE.png` draws the frames that the model saw, with the answer. A file that cannot be read costs one line on
stderr and exit code 1; the others are answered all the same.
"""

import argparse
import dataclasses
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ymplug_jax import hosts

STORED = 16  # frames that data_prep stores by default, from which a model takes its own
TIME_LIMIT = 120  # seconds for one file
BATCH = 8
SUFFIXES = (
    ".mp4",
    ".flv",
    ".mkv",
    ".avi",
    ".mov",
    ".webm",
    ".gif",
    ".mpg",
    ".mpeg",
    ".ts",
    ".m4v",
    ".wmv",
    ".asf",
    ".3gp",
)
TASKS = {
    "classify": ("classify", "alpro_classify"),
    "caption": ("caption", "pretrain"),
    "retrieve": ("retrieve", "alpro_retrieve", "alpro_pretrain", "alpro_prompter"),
}


class Mistake(Exception):
    """Something the user can mend; ends in one line."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 where some files could not be read, 2 for a mistake in the command."""
    args = parse(argv)
    hosts.without_accelerator()
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    try:
        return run(args)
    except Mistake as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ymplug_jax.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=list(TASKS))
    parser.add_argument("--checkpoint", required=True, help="folder of the run (its --workdir), local or gs://")
    parser.add_argument("--video", type=Path, nargs="+", default=[], help="video files, or folders of them")
    parser.add_argument("--title", nargs="+", default=[], help="classify: titles of the videos, in their order")
    parser.add_argument("--text", nargs="+", default=[], help="retrieve: what to look for")
    parser.add_argument("--index", type=Path, help="retrieve: search the videos of this index instead of files")
    parser.add_argument("--export", type=Path, help="retrieve: write the videos as an index (.npz)")
    parser.add_argument("--rank", choices=["videos", "texts"], default="videos", help="retrieve: what is ranked")
    parser.add_argument("--best", type=int, default=5, help="answers to give for each question (default 5)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--sheet", type=Path, help="draw the frames with the answers to this PNG")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Load, decode, answer, print."""
    check(args)
    model = Model(args.checkpoint, args.command)
    clips, failed = read_all(files_of(args.video))
    if args.video and not clips:
        return 1
    if args.command == "retrieve":
        answers = retrieve(args, model, clips)
    else:
        if args.title:
            clips = [clip._replace(title=title) for clip, title in zip(clips, args.title, strict=True)]
        answers = [describe(args, model, row, clip) for row, clip in zip(model.rows(clips), clips, strict=True)]
    for answer in answers:
        print(json.dumps(answer, ensure_ascii=False) if args.json else readable(answer), flush=True)
    if args.sheet and clips:
        texts = [readable(answer) for answer in answers] if len(answers) == len(clips) else [""] * len(clips)
        from ymplug_jax.sheet import draw

        draw(args.sheet, clips, texts, model.experiment.data.frames)
        print(f"frames: {args.sheet}", file=sys.stderr)
    return 1 if failed else 0


def check(args: argparse.Namespace) -> None:
    """Raises Mistake where the flags do not go together."""
    if args.command == "retrieve":
        if not args.video and not args.index:
            raise Mistake("retrieve: give videos with --video, or an index with --index")
        if not args.text and not args.export:
            raise Mistake("retrieve: give --text to search, or --export to write an index")
    elif not args.video:
        raise Mistake(f"{args.command}: give files with --video")
    if args.title and len(args.title) != len(files_of(args.video)):
        raise Mistake(f"{len(args.title)} titles for {len(files_of(args.video))} videos; give one for each")


def files_of(paths: list[Path]) -> list[Path]:
    """The files named, and the videos in the folders named."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not found:
                raise Mistake(f"{path}: no videos in this folder ({', '.join(SUFFIXES)})")
            files += found
        else:
            files.append(path)
    return files


def read_all(files: list[Path]) -> tuple[list[Any], int]:
    """(records of the files that can be read, number of those that cannot); says each failure in one line."""
    import numpy as np

    from data_prep.video_frames import Reader, Reject
    from ymplug_jax import progress
    from ymplug_jax.data.records import Record

    records, failed, reader = [], 0, Reader(TIME_LIMIT)
    try:
        for file in progress.bar(files, desc="read", unit="clip", hidden=len(files) < 9):
            try:
                if not file.is_file():
                    raise Reject("missing_file", "no such file")
                clip = reader.read(file, STORED)
            except Reject as reject:
                failed += 1
                progress.write(f"error: {file}: {reject.reason}: {reject.detail}")
                continue
            records.append(Record(str(file), clip.frames, np.array(clip.timestamps, np.int64), "", [], "", -1))
    finally:
        reader.close()
    return records, failed


class Model:
    """A run's newest checkpoint on one device, ready to answer."""

    def __init__(self, name: str, command: str):
        from ymplug_jax import checkpoint, config

        folder = checkpoint.folder_of(name)
        try:
            experiment = config.from_json((folder / "config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise Mistake(f"{folder}: no config.json here; --checkpoint is the --workdir of a run") from None
        if experiment.task not in TASKS[command]:
            wanted = " or ".join(TASKS[command])
            raise Mistake(f"{folder} is a run of task {experiment.task!r}; {command} needs one of {wanted}")
        tokenizer = Path(experiment.data.tokenizer)
        kept = folder / "tokenizer" / tokenizer.name
        if kept.exists():
            tokenizer = self._copy(kept)
        data = dataclasses.replace(experiment.data, path="", examples=BATCH, tokenizer=str(tokenizer))
        train = dataclasses.replace(experiment.train, batch_size=BATCH, accumulate=1)
        options = dataclasses.replace(experiment.options, group=0, entities="")  # of training alone
        self.experiment = dataclasses.replace(experiment, data=data, train=train, options=options, mesh=config.Mesh())
        self._folder = folder
        self._ready: tuple | None = None

    def _copy(self, file: Any) -> Path:
        """The file on this machine for as long as the model lives: the run may be in a bucket, tokenizers read local files."""
        self._local = tempfile.TemporaryDirectory()
        copy = Path(self._local.name) / file.name
        copy.write_bytes(file.read_bytes())
        return copy

    @property
    def task(self) -> Any:
        """The run's task; there once `rows` was asked for an answer."""
        return self._ready[0]

    def rows(self, records: list[Any]) -> Iterator[dict[str, Any]]:
        """Predictions of the task for each record, in order."""
        import jax
        import numpy as np

        from ymplug_jax import evaluate
        from ymplug_jax import run as run_lib

        if self._ready is None:
            try:
                run = run_lib.prepare(self.experiment, jax.devices()[:1])
                self._ready = run.task, jax.jit(run.task.predict), evaluate.load(run, self._folder)
            except (ValueError, FileNotFoundError) as error:
                raise Mistake(str(error)) from None
        task, predict, params = self._ready
        for start in range(0, len(records), BATCH):
            part = records[start : start + BATCH]
            examples = [task.example(record, None) | {"valid": np.bool_(True)} for record in part]
            examples += [examples[0] | {"valid": np.bool_(False)}] * (BATCH - len(part))  # one shape for all batches
            batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
            found = jax.device_get(predict(params, batch))
            for i in range(len(part)):
                yield {key: value[i] for key, value in found.items()} | {"index": np.int64(start + i)}


def describe(args: argparse.Namespace, model: Model, row: dict[str, Any], clip: Any) -> dict[str, Any]:
    """The answer of classify or caption about one clip."""
    if args.command == "caption":
        (found,) = model.task.score([row | {"index": 0}], [clip]).rows
        return {"video": clip.media_id, "caption": found.get("caption", found.get("generated"))}
    import numpy as np

    from ymplug_jax.data.schema import CLASS_NAMES
    from ymplug_jax.tasks import alpro_classify, classify

    answers = model.experiment.options.answers
    try:
        names = alpro_classify.class_names(model.experiment.options) if answers else CLASS_NAMES
    except FileNotFoundError as error:
        raise Mistake(str(error)) from None
    shown = classify.MODALITIES.index("both" if clip.title else "video")
    votes = row.get("likelihood", row["head"])[shown]  # ALPRO has a head alone
    shares = np.exp(votes - np.logaddexp.reduce(votes))
    best = np.argsort(-shares)[: args.best]
    return {
        "video": clip.media_id,
        "class": names[best[0]],
        "head": names[int(row["head"][shown].argmax())],
        "shown": "video and title" if clip.title else "video",
        "best": {names[c]: round(float(shares[c]), 4) for c in best},
    }


def retrieve(args: argparse.Namespace, model: Model, clips: list[Any]) -> list[dict[str, Any]]:
    """Rankings; writes the index where asked."""
    import numpy as np

    if args.index:
        try:
            with np.load(args.index, allow_pickle=False) as index:
                vectors, names = index["video"], [str(name) for name in index["video_id"]]
        except (OSError, KeyError, ValueError) as error:
            raise Mistake(f"{args.index}: no index of videos ({error}); write one with --export") from None
    else:
        vectors = np.stack([row["video"] for row in model.rows(clips)])
        names = [clip.media_id for clip in clips]
    if args.export:
        np.savez(args.export, video=vectors, video_id=np.array(names))
        print(f"index of {len(names)} videos: {args.export}", file=sys.stderr)
    if not args.text:
        return []
    texts = np.stack([row["text"] for row in model.rows([blank(text) for text in args.text])])
    if texts.shape[1] != vectors.shape[1]:
        raise Mistake(f"{args.index}: vectors of width {vectors.shape[1]}, this run has {texts.shape[1]}")
    scores = texts @ vectors.T  # [texts, videos]
    asked, given, key = (args.text, names, "text") if args.rank == "videos" else (names, args.text, "video")
    scores = scores if args.rank == "videos" else scores.T
    answers = []
    for question, line in zip(asked, scores, strict=True):
        order = np.argsort(-line)[: args.best]
        answers.append({key: question, "ranking": [[given[i], round(float(line[i]), 4)] for i in order]})
    return answers


def blank(text: str) -> Any:
    """A record with this text and a black picture: the text tower does not look at it."""
    import cv2
    import numpy as np

    from ymplug_jax.data.records import Record

    black = cv2.imencode(".jpg", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    return Record("", [black], np.zeros(1, np.int64), text, [], "", -1)


def readable(answer: dict[str, Any]) -> str:
    """An answer for a person."""
    if "caption" in answer:
        return f"{answer['video']}: {answer['caption']}"
    if "ranking" in answer:
        lines = [f"{number}. {name}  ({score:+.3f})" for number, (name, score) in enumerate(answer["ranking"], 1)]
        return "\n".join([answer.get("text") or answer["video"], *("   " + line for line in lines)])
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in answer["best"].items())
    return f"{answer['video']}: {answer['class']}\n   by {answer['shown']}: {shares}; the head says {answer['head']}"


if __name__ == "__main__":
    sys.exit(main())
