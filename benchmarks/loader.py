"""Clips per second of the input pipeline, compared with bare decoding and cropping.

    python -m benchmarks.loader [--path SHARDS] [--clips 960] [--threads 2] [--json FILE] [--against CHECKOUT]

The bare loop decodes the same frames of the same JPEGs from memory and resizes one crop of each: no files, checksums, parsing,
augmentation or batches. A second bare loop also applies the train transform, which separates the cost of the loader from that of
the recipe. The row "for the devices" is the loader with config.data.window. Every measurement starts with empty buffers and
consumes all of its batches. The rows are measured in turn for several rounds, so that other load on the machine affects all of
them, and the median round is printed. Clips per second use wall time; the ratio to the bare loop is also given in processor time,
which other programs disturb less. Without --path the program generates shards of 16 textured frames of 256 x 340 pixels, JPEG
quality 90.

--against runs another checkout of the project too, such as the state before a change: the two take turns on the same shards, in
processes of their own, and each prints its table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import google_crc32c
import numpy as np

from ymplug_jax.data import frames, loader, schema, transforms, windows
from ymplug_jax.data.records import Record, Records

SIZE = 224  # pixels
WINDOW = 342  # config.data.window for frames of 256 pixels
MEASURES = ("clips_per_second", "clips_per_processor_second")  # keys of the report
BATCH = 48  # clips per device in the 1.3b recipe


def message(data: bytes, number: int = 1) -> bytes:
    """A field of a protobuf message that holds bytes or another message."""
    size, digits = len(data), []
    while size > 127:
        digits.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *digits, size]) + data


def feature(name: str, values: list[bytes]) -> bytes:
    """An entry of tf.train.Features: its key and its list of bytes."""
    return message(name.encode()) + message(message(b"".join(map(message, values))), 2)


def make_shards(folder: Path, clips: int, stored: int = 16) -> None:
    """One shard of clips of a moving, textured picture; JPEGs of about 20 KB."""
    data, index, place = [], [], 0
    for clip in range(clips):
        rng = np.random.default_rng(clip)
        picture = cv2.resize(
            rng.integers(0, 256, (36, 48, 3), dtype=np.uint8), (400, 300), interpolation=cv2.INTER_CUBIC
        )
        picture = cv2.add(picture, rng.integers(0, 24, picture.shape, dtype=np.uint8))
        jpegs = []
        for t in range(stored):
            part = picture[2 * t : 2 * t + 256, 3 * t : 3 * t + 340]
            jpegs.append(cv2.imencode(".jpg", part, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
        entries = {schema.IMAGE: jpegs, schema.TITLE: ["一段视频".encode()]}
        payload = message(b"".join(message(feature(name, values)) for name, values in entries.items()))
        size = len(payload).to_bytes(8, "little")
        crcs = [schema.masked_crc(google_crc32c.value(part)).to_bytes(4, "little") for part in (size, payload)]
        data.append(size + crcs[0] + payload + crcs[1])
        index.append((place, len(payload)))
        place += len(data[-1])
    shard = folder / schema.shard_name("benchmark", "train", 0, 1)
    shard.write_bytes(b"".join(data))
    np.save(shard.with_name(shard.name + schema.INDEX_SUFFIX), np.array(index, np.int64))


def bare(jpegs: list[bytes], indices: np.ndarray) -> None:
    """Decode and crop only. Results are discarded, so that the same memory is used again."""
    for i in indices:
        frame = cv2.imdecode(np.frombuffer(jpegs[i], np.uint8), cv2.IMREAD_COLOR_RGB)
        height, width = frame.shape[:2]
        crop = frame[height // 16 : height - height // 16, width // 16 : width - width // 16]
        cv2.resize(crop, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR)


class Pass:
    """`clips` records in a scattered order; records repeat if the split has fewer."""

    def __init__(self, records: Records, clips: int):
        self.path, self.split, self._records, self._clips = records.path, records.split, records, clips

    def __len__(self) -> int:
        return self._clips

    def __getitem__(self, i: int) -> Record:
        return self._records[i * 7919 % len(self._records)]


def measure(path: str, shown: int, clips: int, threads: int, rounds: int) -> tuple[dict, dict]:
    """Name of a row -> clips per second in each round, by wall clock and by processor time."""
    found = Records(path, "train")
    if found.kind == schema.INSTRUCT:
        raise SystemExit(
            f"--path {path}: holds conversations, whose images and clips differ in size; give shards of clips"
        )
    records = Pass(found, clips)
    some = [records[i] for i in range(min(clips, 64))]
    chosen = [
        frames.choose_frames(shown, len(record.frames), np.random.default_rng(i)) for i, record in enumerate(some)
    ]

    def on_threads(work: Callable[[int], None]) -> None:
        """Apply `work` to every clip and discard the results, as a training step would."""
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(work, range(clips)):
                pass

    def bare_train(i: int) -> None:
        clip = frames.Decoded(some[i].frames, chosen[i])
        transforms.train_transform(clip, SIZE, np.random.default_rng(i))

    def pipeline(transform: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> None:
        """A task's preprocessing of a record, without text."""

        def example(record: Record, _: None) -> dict[str, np.ndarray]:
            rng = np.random.default_rng(len(record.frames[0]))  # a pass in order passes no generator, but training does
            clip = frames.Decoded(record.frames, frames.choose_frames(shown, len(record.frames), rng))
            return {"video": transform(clip, rng)}

        stream = loader.batches(
            records, example, seed=0, batch_size=BATCH, rows=range(BATCH), shuffle=False, threads=threads
        )
        for _ in stream:
            pass

    rows: dict[str, Callable[[], None]] = {
        "bare decode + crop": lambda: on_threads(lambda i: bare(some[i % len(some)].frames, chosen[i % len(some)])),
        "bare decode + train": lambda: on_threads(lambda i: bare_train(i % len(some))),
        "records only": lambda: on_threads(lambda i: len(records[i].frames)),
        "loader, plain resize": lambda: pipeline(lambda clip, rng: transforms.eval_transform(clip, SIZE)),
        "loader, train transform": lambda: pipeline(lambda clip, rng: transforms.train_transform(clip, SIZE, rng)),
        "loader, for the devices": lambda: pipeline(lambda clip, rng: windows.train_window(clip, WINDOW, rng)),
    }
    rates: dict[str, list[float]] = {name: [] for name in rows}
    by_processor: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, run in rows.items():
            start, start_processor = time.perf_counter(), time.process_time()
            run()
            if number:  # the first round is a warm-up
                rates[name].append(clips / (time.perf_counter() - start))
                by_processor[name].append(clips / (time.process_time() - start_processor))
    return rates, by_processor


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.splitlines()[0])
    parser.add_argument("--path", help="folder of shards with a split `train`; default: generated shards")
    parser.add_argument("--clips", type=int, default=960, help="clips per measurement")
    parser.add_argument("--frames", type=int, default=4, help="frames per clip")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads in every row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="JSON file for the figures")
    parser.add_argument("--against", type=Path, help="another checkout of the project, to compare with")
    args = parser.parse_args()
    if args.clips % BATCH:
        parser.error(f"--clips {args.clips}: give a multiple of the batch, {BATCH}")
    with tempfile.TemporaryDirectory() as folder:
        if not args.path:
            make_shards(Path(folder), clips=192)
        path = args.path or folder
        if args.against:
            for name, tables in in_turns(args, path).items():
                print(f"\n{name}")
                show(args, *tables)
        else:
            show(args, *measure(path, args.frames, args.clips, args.threads, args.rounds))


def in_turns(args: argparse.Namespace, path: str) -> dict[str, tuple[dict, dict]]:
    """Measure two checkouts in turn, one round each. Name of the checkout -> results of `measure`."""
    found: dict[str, tuple[dict, dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, tree in (("before", args.against), ("after", Path(__file__).parents[1])):
                file = Path(folder) / "round.json"
                settings = {"path": path, "clips": args.clips, "frames": args.frames, "threads": args.threads}
                flags = [f"--{key}={value}" for key, value in settings.items()]
                subprocess.run(
                    [sys.executable, "-m", "benchmarks.loader", *flags, "--rounds=1", f"--json={file}"],
                    cwd=tree, env=os.environ | {"PYTHONPATH": str(tree.resolve())}, check=True, stdout=subprocess.DEVNULL,
                )  # fmt: skip
                report = json.loads(file.read_text(encoding="utf-8"))
                for table, key in zip(found.setdefault(name, ({}, {})), MEASURES, strict=True):
                    for row, rates in report[key].items():
                        table.setdefault(row, []).extend(rates)
    return found


def show(args: argparse.Namespace, rates: dict[str, list[float]], by_processor: dict[str, list[float]]) -> None:
    """Print the table of `measure` and write it to --json."""
    cores = min(args.threads, os.cpu_count() or 1)
    found = {name: statistics.median(values) for name, values in rates.items()}
    busy = {name: statistics.median(values) for name, values in by_processor.items()}
    base = "bare decode + crop"
    print(
        f"{args.frames} frames a clip at {SIZE} px, {args.threads} threads on {cores} cores, OpenCV {cv2.__version__}"
    )
    print(f"{'':26} clips/s  (rounds, from - to)  clips/s/core  of bare  in processor time")
    for name, rate in found.items():
        spread = f"({min(rates[name]):.0f} - {max(rates[name]):.0f})"
        print(
            f"{name:26} {rate:7.0f}  {spread:>20}  {rate / cores:12.0f}  {rate / found[base]:7.0%}  {busy[name] / busy[base]:17.0%}"
        )
    report = {"frames": args.frames, "threads": args.threads, "cores": cores, "opencv": cv2.__version__}
    for key, table in zip(MEASURES, (rates, by_processor), strict=True):
        report[key] = {name: [round(rate, 1) for rate in values] for name, values in table.items()}
    print(json.dumps(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
