"""environment.json of a run folder: facts about its process, and digests of the copies that give token ids and labels their meaning."""

import hashlib
import json
import os
import platform
import sys
from importlib import metadata
from typing import Any

import jax
from etils import epath

from ymplug_jax.core.exits import Mistake

FILE = "environment.json"
TOKENIZER, CLASSES = "tokenizer", "classes.txt"  # a folder with one file, and a file
DIGESTS = "sha256"


def digest(path: epath.Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder: epath.Path) -> dict[str, str]:
    """SHA-256 of the run's copies of its tokenizer and class names, by their path in the folder."""
    kept = folder / TOKENIZER
    files = [*(kept.iterdir() if kept.is_dir() else ()), folder / CLASSES]
    names = {f"{TOKENIZER}/{file.name}" if file.name != CLASSES else CLASSES: file for file in files if file.is_file()}
    return {name: digest(file) for name, file in sorted(names.items())}


def stored(folder: epath.Path) -> dict[str, str]:
    """The digests from the run's first start; none in a run of a version without them, or if the file is damaged."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))[DIGESTS]
        return {str(name): str(digest) for name, digest in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def check(folder: epath.Path) -> None:
    """Check that the run's copies of its tokenizer and class names are those of its first start.

    Raises:
      Mistake: one has changed.
    """
    before, now = stored(folder), digests(folder)
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            raise Mistake(
                f"{folder / name}: not the file that the run began with (its SHA-256 differs); restore that file"
            )


def facts(kept: dict[str, str]) -> dict[str, Any]:
    """Return the content of environment.json: command, folder, devices and library versions of this process, and `kept` digests."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ymplug_jax")
    return {
        "command": sys.argv,
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [str(device.device_kind) for device in jax.devices()],
        "processes": jax.process_count(),
        "versions": {name: metadata.version(name) for name in names},
        DIGESTS: kept,
    }
