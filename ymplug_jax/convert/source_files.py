"""Finds the files of a source: folders of model hubs and training programs, sharded files with an index, and files to refuse."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ymplug_jax.convert import pieces
from ymplug_jax.core import exits, text_files

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
INDEX = ".index.json"
# Files that training programs store beside the weights.
_BESIDE = (
    r"(adapter_model|training_args|optimizer|scheduler|scaler|rng_state|random_states|distrib_optim)|.*_optim_states"
)
_SET = re.compile(r"(?P<stem>.+)[-_](?P<number>\d+)-of-(?P<count>\d+)(?P<end>\.\w+)")
_FORMATS = {
    b"\x1f\x8b": "a gzip archive; unpack it and give the file inside",
    b"BZh": "a bzip2 archive; unpack it and give the file inside",
    b"\xfd7zXZ": "an xz archive; unpack it and give the file inside",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it and give the file inside",
    b"7z\xbc\xaf": "a 7z archive; unpack it and give the file inside",
    b"Rar!": "a RAR archive; unpack it and give the file inside",
    b"\x89HDF": "an HDF5 file of Keras or TensorFlow; give the model's PyTorch file",
    b"GGUF": "a GGUF file, which is quantised; give the model's PyTorch file",
    b"\x93NUMPY": "a NumPy array; give the model's PyTorch file",
}


class SourceError(exits.Mistake):
    """The source cannot be used. The message names the file and the fix."""


class Listed(NamedTuple):
    """A file of a source."""

    file: Path
    names: frozenset[str] | None = None  # tensors that the index lists in this file


def listed(paths: Sequence[Path]) -> tuple[list[Listed], list[str]]:
    """Find the files of a source.

    Args:
      paths: files, `*.index.json` that list them, or folders.

    Returns:
      The files, and lines that tell the user which files were chosen in folders.

    Raises:
      SourceError: a path does not exist, a folder holds no weights or several models, a set of shards is incomplete, a file is given
        twice, or a file does not hold weights.
    """
    found: list[Listed] = []
    notes: list[str] = []
    for path in paths:
        path = path.expanduser()
        chosen = [path]
        if path.is_dir():
            chosen = _inside(path)
            notes.append(f"{path}: using {', '.join(str(file.relative_to(path)) for file in chosen)}")
        for file in chosen:
            found += _of_index(file) if file.name.endswith(INDEX) else [Listed(file)]
    real: dict[Path, Path] = {}
    for file, _ in found:
        refuse_stand_ins(file)
        if other := real.get(file.resolve()):
            also = "" if other == file else f" (also as {other})"
            raise SourceError(f"{file}: given twice{also}; give every file once")
        real[file.resolve()] = file
    _check_sets([file for file, names in found if names is None])
    return found, notes


def read_json(file: Path) -> Any:
    """Content of a JSON file, with or without a byte order mark.

    Raises:
      SourceError: the file does not exist or is not JSON.
    """
    refuse_stand_ins(file)
    try:
        return json.loads(text_files.read_text(file))
    except exits.Mistake as error:
        raise SourceError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: not JSON ({error}); download it again") from None


def refuse_stand_ins(file: Path) -> None:
    """Refuse files that are commonly saved in place of weights or settings.

    Raises:
      SourceError: the file does not exist, is empty, or is a Git LFS pointer, a web page, an error message of a server, an archive
        or a file of another program.
    """
    if not file.is_file():
        if file.is_symlink():
            raise SourceError(f"{file}: broken link to {file.readlink()}; download it again")
        raise SourceError(f"{file}: {'not a regular file' if file.exists() else 'no such file'}; correct the path")
    try:
        with file.open("rb") as stream:
            head = stream.read(4096)
    except OSError as error:
        raise SourceError(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    if not head:
        raise SourceError(f"{file}: empty; download it again")
    said = text_files.lfs_pointer(head) or text_files.web_page(head)
    said = said or next((what for magic, what in _FORMATS.items() if head.startswith(magic)), "")
    if said:
        raise SourceError(f"{file}: {said}")
    if not head.strip(b"\0"):
        raise SourceError(f"{file}: begins with zeros, as an unfinished download does; download it again")
    if file.suffix != ".json" and (words := _message(head)):
        raise SourceError(f"{file}: text, not weights ({words!r}); download it again")


def _message(head: bytes, most: int = 80) -> str:
    """Beginning of a text file, such as a server's error message; "" for other files."""
    try:
        words = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3:  # more than a character cut off at the end
            return ""
        words = head[: error.start].decode("utf-8")
    if not all(letter.isprintable() or letter in "\r\n\t\ufeff" for letter in words):
        return ""
    line = " ".join(words.split())
    return line if len(line) <= most else line[:most] + "..."


def _of_index(index: Path) -> list[Listed]:
    data = read_json(index)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise SourceError(f"{index}: not an index of shards (JSON with a weight_map); download it again")
    names = sorted(set(places.values()))
    if escaped := [name for name in names if Path(name).name != name]:
        raise SourceError(f"{index}: lists {escaped[0]}, which is outside its folder; download it again")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise SourceError(
            f"{index}: {len(missing)} of its {len(names)} files are missing, the first is {missing[0]}; download them"
        )
    return [
        Listed(index.parent / name, frozenset(tensor for tensor, place in places.items() if place == name))
        for name in names
    ]


def _check_sets(files: Sequence[Path]) -> None:
    """Check that files named `*-00001-of-00002.*` are one complete set.

    Raises:
      SourceError: the set is incomplete, or files of two sets are given.
    """
    sets: dict[tuple[Path, str, int, str], dict[int, Path]] = {}
    for file in files:
        if match := _SET.fullmatch(file.name):
            key = (file.parent, match["stem"], int(match["count"]), match["end"])
            sets.setdefault(key, {})[int(match["number"])] = file
    if len(sets) > 1:
        one, two = (next(iter(members.values())) for members in list(sets.values())[:2])
        raise SourceError(f"{one} and {two}: belong to two sets of files; give only those of one model")
    for (folder, stem, count, end), members in sets.items():
        missing = sorted(set(range(1, count + 1)) - set(members))
        if missing or len(members) != count:
            index = folder / f"{stem}{end}{INDEX}"
            fix = f"--source {index}" if index.is_file() else f"all {count}, or their folder: --source {folder}"
            raise SourceError(
                f"{next(iter(members.values()))}: belongs to a set of {count} files, of which {len(members)} are given; give {fix}"
            )


def _inside(folder: Path) -> list[Path]:
    """Files of the only model in a folder or, if the folder itself holds none, in one of its subfolders.

    Raises:
      SourceError: there is no model, or more than one.
    """
    if (folder / "checkpoints").is_dir():
        raise SourceError(f"{folder}: holds a checkpoint of ymplug_jax; add --to torch to convert it back")
    found = _models(folder)
    if not found:
        below = sorted(path for path in _folders(folder) if _models(path))
        if len(below) > 1:
            raise SourceError(f"{folder}: holds several models; give one: --source {_or(below)}")
        if not below:
            raise SourceError(
                f"{folder}: has no weights ({_held(folder)}); give a file ({', '.join(WEIGHTS)}) or the folder that holds it"
            )
        found = _models(below[0])
    if len(found) > 1:
        raise SourceError(f"{folder}: holds several weight files; give one: --source {_or([m[0] for m in found])}")
    return found[0]


def _folders(folder: Path, depth: int = 3) -> list[Path]:
    below = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")] if depth else []
    return [*below, *(path for part in below for path in _folders(part, depth - 1))]


def _models(folder: Path) -> list[list[Path]]:
    """Files of each model in a folder: an index, a set of shards, tensor-parallel pieces, or a single file."""
    here = sorted(path for path in folder.iterdir() if path.is_file() or path.is_symlink())
    indexes = [path for path in here if path.name.endswith(tuple(f"{end}{INDEX}" for end in WEIGHTS))]
    counted = {listed.file for index in indexes for listed in _of_index(index)}
    files = [
        path for path in here if path.suffix in WEIGHTS and path not in counted and not re.match(_BESIDE, path.name)
    ]
    groups: dict[str, list[Path]] = {}
    for file in files:
        member = _SET.fullmatch(file.name)
        ranked = pieces.rank_of(file) is not None
        key = f"{member['stem']} of {member['count']}{member['end']}" if member else "pieces" if ranked else file.name
        groups.setdefault(key, []).append(file)
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and re.fullmatch(r"mp_rank_\d+", path.name)]
    if below:  # Megatron writes each piece into its own folder
        held = [[file for file in sorted(path.iterdir()) if file.suffix in WEIGHTS] for path in below]
        groups["folders"] = [
            file for files in held for file in files if len(files) == 1 or not re.match(_BESIDE, file.name)
        ]
    models = [*([index] for index in indexes), *(group for group in groups.values() if group)]
    # Model hubs often store the same weights as safetensors and as a pickle.
    first = {"model.safetensors", f"model.safetensors{INDEX}"}
    both = first | {"pytorch_model.bin", f"pytorch_model.bin{INDEX}"}
    if {model[0].name for model in models} <= both and (kept := [m for m in models if m[0].name in first]):
        return kept
    return models


def _held(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return "it is empty" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def _or(names: Sequence[Any]) -> str:
    return " or ".join(map(str, names[:4])) + (f" or {len(names) - 4} more" if len(names) > 4 else "")
