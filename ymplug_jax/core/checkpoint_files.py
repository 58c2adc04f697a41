"""Paths and contents of a run's checkpoint files, and error messages for damaged ones. See `checkpoint`."""

import contextlib
import hashlib
import json
import logging
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from ymplug_jax.core import exits, leaf_checksums
from ymplug_jax.core import places as places_lib
from ymplug_jax.core.exits import PlaceFailed
from ymplug_jax.core.verified_read import Damaged

FROZEN = "frozen"
BEST = "best"  # subfolder of a run: a run folder with its best step only, which uses the run's frozen parameters
STEPS = "steps"
COMMITTED = "commit_success.txt"  # written last by Orbax into a folder on gs://
TRAINABLE, OPT_STATE, CHECKSUMS = "trainable", "opt_state", "checksums"
CARRIED = "carried"  # in the steps of tasks that carry state beside their parameters
METADATA = "_CHECKPOINT_METADATA"  # Orbax's file in the folder of a step
CONVERTED = "converted"  # item folder of parameters converted from another program's checkpoint

SPACE = "check its free space and permissions, then run the same command again to resume from the newest checkpoint"
# NAME= or NAME:STORED= in config.train.init_from. Parameter paths never begin like folder paths (/ . ~ gs:).
SUBTREE = re.compile(r"([A-Za-z_]\w*(?:/\w+)*(?::(?:\w+(?:/\w+)*)?)?)=")
# Messages of the system are more specific than TensorStore's codes, so they are searched first.
FAILED_WRITE = (
    re.compile(
        r"No space left on device|Disk quota exceeded|Read-only file system|Permission denied|Input/output error|File too large"
        r"|No such file or directory|Not a directory"
    ),
    re.compile(r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|NOT_FOUND"),
)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged or does not fit the model. The message names the folder, the parameter and the fix."""


def folder_of(name: str, what: str = "") -> epath.Path:
    """Return the folder that a flag or setting names, see `places.place`."""
    return places_lib.place(name, what)


def whole(name: str) -> epath.Path:
    """Return the absolute folder of a name. `absolute` of epath treats gs:// as a local path."""
    folder = folder_of(name)
    return folder if "://" in str(folder) else folder.absolute()


@contextlib.contextmanager
def place_of(folder: epath.Path) -> Iterator[None]:
    """Convert errors of reading and writing files in the block to PlaceFailed, with one line that names the folder.

    TensorStore raises ValueError and Exception with the system's message, and Orbax passes them on from its threads.
    """
    try:
        yield
    except (PlaceFailed, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if hidden := exits.place_failed(error):
            raise PlaceFailed(str(hidden)) from error
        chain = exits.chain_of(error)
        for one in chain:
            if isinstance(one, OSError):
                raise PlaceFailed(f"{folder}: cannot be written ({one.strerror or one}); {SPACE}") from error
        for words in FAILED_WRITE:
            if found := words.search("\n".join(map(str, chain))):
                raise PlaceFailed(f"{folder}: cannot be written ({found[0]}); {SPACE}") from error
        raise


def latest_step(workdir: str) -> int | None:
    """Return the newest step of a run, or None."""
    return max(steps_of(whole(workdir)), default=None)


def examples_seen(workdir: str) -> int:
    """Return the number of training examples before the newest step; 0 for a new run, or if the step is damaged."""
    if (step := latest_step(workdir)) is None:
        return 0
    try:
        return int(
            json_in(whole(workdir) / "checkpoints" / STEPS / str(step) / "progress", "its progress")["examples_seen"]
        )
    except (Damaged, KeyError, TypeError, ValueError):
        return 0


def steps_of(workdir: epath.Path) -> list[int]:
    """Return the steps whose checkpoints are complete: renamed on a disk, and in a bucket, which has no renames, with a file that says so."""
    folder = workdir / "checkpoints" / STEPS
    found = [p for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    return [int(p.name) for p in found if not places_lib.is_remote(p) or (p / COMMITTED).exists()]


def places(workdir: str, step: int | None = None) -> list[epath.Path]:
    """Return the item folders that together hold all parameters of a step; None: of the newest step."""
    folder = whole(workdir) / "checkpoints"
    step = latest_step(workdir) if step is None else step
    possible = [folder / CONVERTED, folder / FROZEN]
    if folder.parent.name == BEST and not possible[1].exists():
        possible[1] = folder.parent.parent / "checkpoints" / FROZEN
    # Listed even if it is gone: a step that lost its parameters is damaged, not a run with frozen parameters only.
    return [place for place in possible if place.exists()] + (
        [folder / STEPS / str(step) / TRAINABLE] if step is not None else []
    )


def sources(init_from: str) -> list[tuple[str, str, str]]:
    """Parse the setting `init_from` into [(subtree of the model, its name in the folder, folder)].

    "DIR" gives every parameter (subtree ""), "llm=DIR,vision=DIR" gives subtrees, "prompter:=DIR" loads all parameters of the
    folder below `prompter`, and "vision/blocks/temporal_attn:vision/blocks/attn=DIR" loads a subtree under another name.

    Folder names may contain "=", "," and ":". A part that exists as a folder, or cannot begin with a subtree name, is a folder;
    text after a comma that does not begin with a subtree name belongs to the previous folder name.

    Raises:
      CheckpointError: a part has none of these forms.
    """
    if not init_from.strip():
        return []
    parts: list[str] = []
    for part in init_from.split(","):
        if parts and not SUBTREE.match(part.strip()):
            parts[-1] += f",{part}"  # the folder name contains a comma
        else:
            parts.append(part.strip())
    parts = [part.strip().rstrip(",") for part in parts if part.strip(" ,")]
    if len(parts) > 1 and _is_folder(init_from.strip()):
        parts = [init_from.strip()]
    pairs = []
    for part in parts:
        head = SUBTREE.match(part)
        if head is None or _is_folder(part):
            pairs.append(("", "", part))
            continue
        subtree, other, stored_as = head[1].partition(":")
        pairs.append((subtree, stored_as if other else subtree, part[head.end() :]))
    if len(pairs) > 1 and any(not subtree for subtree, _, _ in pairs):
        raise CheckpointError(
            f'config.train.init_from: several folders, but not each has a subtree name, in {init_from!r}; write "llm=DIR,vision=DIR"'
        )
    if empty := [subtree for subtree, _, folder in pairs if not folder]:
        raise CheckpointError(
            f"config.train.init_from: {empty[0]}= has no folder, in {init_from!r}; write {empty[0]}=DIR"
        )
    return pairs


def _is_folder(name: str) -> bool:
    """Return whether a local folder of this name exists. A name with "://" may be NAME=gs://..., so it is never one."""
    return "://" not in name and folder_of(name).exists()


def fingerprint(workdir: str) -> str:
    """Return a SHA-256 of the parameters of the newest checkpoint, independent of the folder.

    It hashes the stored checksums, or the files if the checkpoint was saved without checksums by an older version.

    Raises:
      CheckpointError: the folder holds no checkpoint.
    """
    lines = []
    if not (found := places(workdir)):
        raise CheckpointError(
            f"{workdir}: no checkpoint here; give the --workdir of a run or the --out of a conversion"
        )
    for place in found:
        if (sums := sums_in(place, step_folder(whole(workdir), latest_step(workdir)))) is not None:
            lines += [f"{path} {value}\n" for path, value in sums.items()]
            continue
        folders = [place]
        for folder in folders:
            for file in folder.iterdir():
                if file.is_dir():
                    folders.append(file)
                else:
                    lines.append(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def sums_of(step_folder: epath.Path) -> dict[str, dict[str, str]] | None:
    """Return {item: {path: checksum}} of a step, or None if an older version saved it without checksums.

    Raises:
      Damaged: the step was saved with checksums, and they are missing or invalid.
    """
    if not (step_folder / CHECKSUMS).exists():
        if _saved_with_sums(step_folder):
            raise Damaged("its item 'checksums'", f"saved with the step but missing ({step_folder / CHECKSUMS})")
        return None
    sums = json_in(step_folder / CHECKSUMS, "its checksums")
    if not all(isinstance(part, dict) for part in sums.values()):
        raise Damaged("its checksums", "not a valid list of checksums")
    return sums


def _saved_with_sums(step_folder: epath.Path) -> bool:
    """Return whether the step's metadata lists checksums among its items."""
    try:
        items = json.loads((step_folder / METADATA).read_bytes())["item_handlers"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(items, dict) and CHECKSUMS in items


def step_folder(workdir: epath.Path, step: int | None) -> epath.Path | None:
    """Return the folder of a saved step; None for a conversion, which has no steps."""
    return None if step is None else workdir / "checkpoints" / STEPS / str(step)


def sums_in(place: epath.Path, step: epath.Path | None) -> dict[str, str] | None:
    """Return the checksums of the parameters in one of the `places` of a step; None if it was saved without.

    Args:
      place: folder of the item.
      step: folder of the step, which also stores the checksums of the frozen parameters; None for a conversion.
    """
    if place.name == TRAINABLE:
        return (sums_of(place.parent) or {}).get(TRAINABLE)
    in_step = (sums_of(step) or {}).get(FROZEN) if step is not None and place.name == FROZEN else None
    return in_step or leaf_checksums.read(place)


def json_in(item: epath.Path, what: str) -> dict[str, Any]:
    """Read an item that Orbax saved as JSON.

    Raises:
      Damaged: the item is missing or not a JSON object.
    """
    try:
        content = json.loads((item / "metadata").read_bytes())
    except FileNotFoundError:
        raise Damaged(what, f"cannot be read ({item / 'metadata'} is missing)") from None
    except ValueError:
        raise Damaged(what, f"cannot be read ({item / 'metadata'} is not JSON)") from None
    if not isinstance(content, dict):
        raise Damaged(what, f"cannot be read ({item / 'metadata'} is not a JSON object)")
    return content


def say_unverified(place: epath.Path) -> None:
    """Log a warning that a folder was read without checksums to verify it."""
    logging.warning("%s: saved without checksums by an older version; not verified", place)


def damaged(workdir: epath.Path, step: int | None, error: Damaged, read: Callable[[int], Any]) -> CheckpointError:
    """Build the error for a damaged step (None: a conversion). It names the newest step that `read` can read, and how to resume from it."""
    folder = workdir / "checkpoints"
    if step is None:
        return CheckpointError(f"{folder}: {error.what} is damaged: {error.reason}; convert or copy it again")
    newer = [step]
    for older in sorted((s for s in steps_of(workdir) if s < step), reverse=True):
        try:
            read(older)
        except (Damaged, CheckpointError):
            newer.append(older)
            continue
        move = "gcloud storage mv" if "://" in str(folder) else "mv"
        command = " && ".join(
            f"{move} {shlex.quote(str(folder / STEPS / str(s)))} {shlex.quote(str(folder / f'damaged_{s}'))}"
            for s in newer
        )
        fix = f"the newest undamaged step is {older}; to resume from it, move the damaged steps away: {command}"
        break
    else:
        fix = f"every step of {workdir} is damaged; restore the folder from a copy, or start again in another --workdir"
    return CheckpointError(f"{workdir}: step {step}: {error.what} is damaged: {error.reason}; {fix}")


def fits(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: epath.Path, *, extra_allowed: bool = False
) -> None:
    """Compare names and shapes of stored parameters with those of the model.

    Raises:
      CheckpointError: names are missing, extra (unless `extra_allowed`), or have another shape.
    """
    missing = sorted(set(wanted) - set(stored))
    extra = [] if extra_allowed else sorted(set(stored) - set(wanted))
    shapes = [
        f"{p} is {tuple(stored[p].shape)}, wanted {tuple(wanted[p].shape)}"
        for p in wanted
        if p in stored and tuple(stored[p].shape) != tuple(wanted[p].shape)
    ]
    problems = [
        f"{name} {_some(items)}"
        for name, items in (("missing:", missing), ("not in the model:", extra), ("other shape:", shapes))
        if items
    ]
    if problems:
        raise CheckpointError(
            f"{folder} does not fit the model of this config; {'; '.join(problems)}; use the config of the run that wrote it"
        )


def _some(items: Iterable[str], most: int = 4) -> str:
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
