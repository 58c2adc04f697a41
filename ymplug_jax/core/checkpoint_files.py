"""Where the checkpoints of a run lie, what is stored in them, and what to say of one that is damaged. See `checkpoint`."""

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

from ymplug_jax.core import leaf_checksums
from ymplug_jax.core.exits import PlaceFailed
from ymplug_jax.core.verified_read import Damaged

FROZEN = "frozen"
BEST = "best"  # folder below a run's own: a run's folder of its best step, which shares the frozen parameters
STEPS = "steps"
TRAINABLE, OPT_STATE, CHECKSUMS = "trainable", "opt_state", "checksums"
CONVERTED = "converted"  # parameters of another program's checkpoint, in a folder of their own

SPACE = "look at its free space and permissions; the same command goes on from the newest checkpoint"
# NAME= or NAME:STORED= of config.train.init_from: paths of parameters, which never begin as paths of folders do (/ . ~ gs:).
SUBTREE = re.compile(r"([A-Za-z_]\w*(?:/\w+)*(?::(?:\w+(?:/\w+)*)?)?)=")
# The words of the system say more than the codes of TensorStore, which may stand before them.
FAILED_WRITE = (
    re.compile(
        r"No space left on device|Disk quota exceeded|Read-only file system|Permission denied|Input/output error|File too large"
        r"|No such file or directory|Not a directory"
    ),
    re.compile(r"RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|NOT_FOUND"),
)


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or does not fit; the message names the folder, the parameter and the fix."""


def folder_of(name: str) -> epath.Path:
    """The folder that a flag or a setting names: local, local as file:///..., or gs://bucket/... (which pathlib would break)."""
    return epath.Path(str(name).removeprefix("file://")).expanduser()


def whole(name: str) -> epath.Path:
    """The folder of a name, from the root; epath's own `absolute` takes gs:// for a local name."""
    folder = folder_of(name)
    return folder if "://" in str(folder) else folder.absolute()


@contextlib.contextmanager
def place_of(folder: epath.Path) -> Iterator[None]:
    """Errors of files inside become PlaceFailed, one line that names the place.

    TensorStore raises ValueError and Exception with the words of the system, Orbax passes them on from its threads.
    """
    try:
        yield
    except (PlaceFailed, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
            chain.append(cause)
        for one in chain:
            if isinstance(one, OSError):
                raise PlaceFailed(f"{folder}: cannot be written ({one.strerror or one}); {SPACE}") from error
        for words in FAILED_WRITE:
            if found := words.search("\n".join(map(str, chain))):
                raise PlaceFailed(f"{folder}: cannot be written ({found[0]}); {SPACE}") from error
        raise


def latest_step(workdir: str) -> int | None:
    """Newest step of a run, or None."""
    return max(steps_of(whole(workdir)), default=None)


def steps_of(workdir: epath.Path) -> list[int]:
    """Steps that were saved to their end."""
    folder = workdir / "checkpoints" / STEPS
    return [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []


def places(workdir: str, step: int | None = None) -> list[epath.Path]:
    """Item folders that together hold all parameters of the newest checkpoint, or of a step."""
    folder = whole(workdir) / "checkpoints"
    step = latest_step(workdir) if step is None else step
    possible = [folder / CONVERTED, folder / FROZEN]
    if folder.parent.name == BEST and not possible[1].exists():
        possible[1] = folder.parent.parent / "checkpoints" / FROZEN
    # A step whose parameters are gone is damaged: it must not pass for a run that has only frozen ones.
    return [place for place in possible if place.exists()] + (
        [folder / STEPS / str(step) / TRAINABLE] if step is not None else []
    )


def sources(init_from: str) -> list[tuple[str, str, str]]:
    """[(subtree, its name in the folder, folder)] of the setting `init_from`: "DIR" is every parameter (subtree ""),
    "llm=DIR,vision=DIR" are some, "prompter:=DIR" is all that the folder has, put below that name, and
    "vision/blocks/temporal_attn:vision/blocks/attn=DIR" is a part under another name.

    Names of folders may hold "=", "," and ":". What exists under the whole name is a folder, and so is what cannot begin with the
    name of a subtree; after a comma, what begins with no subtree belongs to the name of the folder before.

    Raises:
      CheckpointError: a part that cannot be read so.
    """
    if not init_from.strip():
        return []
    parts: list[str] = []
    for part in init_from.split(","):
        if parts and not SUBTREE.match(part.strip()):
            parts[-1] += f",{part}"  # a comma in the name of a folder
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
            f'config.train.init_from is {init_from!r}; write one "DIR", or "llm=DIR,vision=DIR" with a name for each'
        )
    if empty := [subtree for subtree, _, folder in pairs if not folder]:
        raise CheckpointError(
            f"config.train.init_from is {init_from!r}: {empty[0]}= names no folder; write {empty[0]}=DIR"
        )
    return pairs


def _is_folder(name: str) -> bool:
    """Of this machine: where NAME= comes before gs://, it is a subtree."""
    return "://" not in name and folder_of(name).exists()


def fingerprint(workdir: str) -> str:
    """SHA-256 that tells the parameters of the newest checkpoint from others, whatever folder they stand in.

    It is taken over their checksums; over the files where an older version saved without.

    Raises:
      CheckpointError: no checkpoint there.
    """
    lines = []
    if not (found := places(workdir)):
        raise CheckpointError(f"{workdir}: no checkpoint here; give the folder of a run or of a conversion")
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
    """{item: {path: checksum}} of a step; None for one of an older version."""
    if not (step_folder / CHECKSUMS).exists():
        return None
    sums = json_in(step_folder / CHECKSUMS, "its checksums")
    if not all(isinstance(part, dict) for part in sums.values()):
        raise Damaged("its checksums", "are no checksums")
    return sums


def step_folder(workdir: epath.Path, step: int | None) -> epath.Path | None:
    """The folder of a saved step; None for a conversion, which has none."""
    return None if step is None else workdir / "checkpoints" / STEPS / str(step)


def sums_in(place: epath.Path, step: epath.Path | None) -> dict[str, str] | None:
    """Checksums of the parameters in one of the `places` of a step; None if it was saved without.

    Args:
      place: the item's folder.
      step: that of the step, which also has the checksums of the run's frozen parameters; None for a conversion.
    """
    if place.name == TRAINABLE:
        return (sums_of(place.parent) or {}).get(TRAINABLE)
    in_step = (sums_of(step) or {}).get(FROZEN) if step is not None and place.name == FROZEN else None
    return in_step or leaf_checksums.read(place)


def json_in(item: epath.Path, what: str) -> dict:
    """Content of an item that Orbax saved as JSON."""
    try:
        content = json.loads((item / "metadata").read_bytes())
    except FileNotFoundError:
        raise Damaged(what, f"cannot be read ({item / 'metadata'} is missing)") from None
    except ValueError:
        raise Damaged(what, f"cannot be read ({item / 'metadata'} is no JSON)") from None
    if not isinstance(content, dict):
        raise Damaged(what, f"cannot be read ({item / 'metadata'} is no JSON object)")
    return content


def say_unverified(place: epath.Path) -> None:
    logging.warning("%s: saved without checksums by an older version; read unverified", place)


def damaged(workdir: epath.Path, step: int | None, error: Damaged, read: Callable[[int], Any]) -> CheckpointError:
    """The error for a step (None: a conversion) that is damaged, with the newest step that `read` can read, and how to go on from it."""
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
        fix = f"the newest whole step is {older}: to go on from it, put the damaged aside with: {command}"
        break
    else:
        fix = f"no step of {workdir} is whole; copy the folder again from where it was whole, or begin again in another --workdir"
    return CheckpointError(f"{workdir}: step {step}: {error.what} is damaged: {error.reason}; {fix}")


def fits(
    stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: epath.Path, *, extra_allowed: bool = False
) -> None:
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
            f"{folder} does not fit the model of this config; {'; '.join(problems)}. Use the config that wrote it"
        )


def _some(items: Iterable[str], most: int = 4) -> str:
    items = list(items)
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
