"""What a training run leaves behind, as values that another run of the same settings must repeat bit for bit."""

import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from ymplug_jax.core import checkpoint_files, leaf_store, metrics

CLOCK = {"time", "samples_per_second", "input_wait"}  # values of metrics.jsonl that depend on the machine
# Files that name the machine, or are appended to by every start; metrics.jsonl is compared line by line.
OTHER = {"environment.json", "metrics.jsonl", "tensorboard", "checkpoints", "best", "tokenizer"}
KINDS = {"trainable": "parameters", "opt_state": "optimizer state", "carried": "carried state"}

Content = dict[tuple[str, str], Any]  # (kind, what exactly) -> value


def content(workdir: epath.Path) -> Content:
    """Everything in a run's folder that must not depend on interruptions.

    Args:
      workdir: folder of a run, local or in a bucket.

    Returns:
      {(kind, what exactly): value}. Arrays are read from the disk and stand as the SHA-256 of dtype, shape and bytes.
    """
    found: Content = {}
    for name, folder in (("", workdir), ("best/", workdir / checkpoint_files.BEST)):
        steps = sorted(checkpoint_files.steps_of(folder))
        found["best step" if name else "steps", f"{name}steps"] = steps
        for step in steps:
            found |= {(kind, f"{name}{step}/{what}"): value for kind, what, value in _step(folder, step)}
        found |= {("files", name + path): value for path, value in _files(folder, workdir)}
    if (frozen := workdir / "checkpoints" / "frozen").exists():
        found |= {("frozen parameters", path): value for path, value in _leaves(frozen)}
    note = workdir / "best" / "best.json"
    found["best step", "best.json"] = json.loads(note.read_text()) if note.exists() else None
    lines = [{key: line[key] for key in line.keys() - CLOCK} for line in metrics.read_metrics(workdir)]
    for i, line in enumerate(lines):
        kind = "scores" if any(key.startswith("eval/") for key in line) else "metrics"
        found[kind, f"line {i} of metrics.jsonl"] = line
    return found


def differences(want: Content, got: Content) -> list[str]:
    """ "kind: what exactly: wanted, found" of all values that differ, are missing or are extra."""
    return [
        f"{key[0]}: {key[1]}: {want.get(key, 'missing')!s:.200} -> {got.get(key, 'missing')!s:.200}"
        for key in sorted(want.keys() | got.keys())
        if key not in want or key not in got or want[key] != got[key]
    ]


def _step(folder: epath.Path, step: int) -> Iterator[tuple[str, str, Any]]:
    """(kind, what, value) of a saved step."""
    place = folder / "checkpoints" / checkpoint_files.STEPS / str(step)
    for item in sorted(entry.name for entry in place.iterdir()):
        if item in KINDS:
            yield from ((KINDS[item], path, value) for path, value in _leaves(place / item))
        elif item in ("progress", "checksums"):
            yield (
                "data position" if item == "progress" else "checksums",
                item,
                checkpoint_files.json_in(place / item, item),
            )


def _leaves(item: epath.Path) -> Iterator[tuple[str, str]]:
    """(path, SHA-256) of every array of an item folder."""
    tree = json.loads((item / "_METADATA").read_text())["tree_metadata"].values()
    names = ("/".join(str(key["key"]) for key in leaf["key_metadata"]) for leaf in tree if _is_array(leaf))
    for path in sorted(names):
        value = np.asarray(leaf_store.open_leaf(item, path).read().result())
        head = f"{value.dtype} {value.shape} ".encode()
        yield path, hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()


def _is_array(leaf: dict[str, Any]) -> bool:
    return not leaf["value_metadata"].get("skip_deserialize")


def _files(folder: epath.Path, workdir: epath.Path) -> Iterator[tuple[str, str]]:
    """(name, SHA-256) of the files that a run writes beside its checkpoints."""
    if not folder.exists():
        return
    places = [entry for entry in folder.iterdir() if entry.name not in OTHER]
    if (folder / "tokenizer").exists():
        places += (folder / "tokenizer").iterdir()
    for file in sorted(places):
        # The model card repeats the command: without the folder and the port, it is the same for all runs.
        text = file.read_bytes().replace(str(workdir).encode(), b"FOLDER")
        yield str(file.name), hashlib.sha256(re.sub(rb"localhost:\d+", b"localhost:PORT", text)).hexdigest()
