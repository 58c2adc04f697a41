"""Orders tensor-parallel pieces by the ranks in their file names and in the settings stored beside the tensors."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ymplug_jax.core import exits

# Keys of Megatron and DeepSpeed.
_COUNT = ("tensor_model_parallel_size", "mp_world_size", "model_parallel_size")
_RANK = ("tensor_model_parallel_rank", "tensor_rank", "model_parallel_rank", "mp_rank")
_STAGES = ("pipeline_model_parallel_size", "pipe_parallel_size")


class Facts(NamedTuple):
    """Ranks and sizes that a file states; None where it states nothing."""

    rank: int | None = None  # tensor-parallel rank
    process: int | None = None  # global rank in the run that wrote the file
    pieces: int | None = None  # tensor-parallel size
    stages: int | None = None  # pipeline-parallel size
    version: float | None = None  # Megatron's checkpoint version


def facts_of(loaded: Any) -> Facts:
    """Ranks and sizes that a training program stored at the top level of its file or in its arguments."""
    if not isinstance(loaded, dict):
        return Facts()
    client = loaded.get("client_state")
    places = [loaded, loaded.get("args"), client, client.get("args") if isinstance(client, dict) else None]

    def first(names: Sequence[str], least: int, places: Sequence[Any] = places) -> Any:
        for place in places:
            held = vars(place) if isinstance(place, argparse.Namespace) else place
            for name in names if isinstance(held, dict) else ():
                value = held.get(name)
                if isinstance(value, int | float) and not isinstance(value, bool) and value >= least:
                    return value
        return None

    return Facts(
        first(_RANK, 0), first(["rank"], 0), first(_COUNT, 1), first(_STAGES, 1), first(["checkpoint_version"], 0)
    )


def rank_of(file: Path) -> int | None:
    """Rank in the name of a file or of its folder: mp_rank_01_model_states.pt, mp_rank_01/model_rng.pt."""
    for name in (file.name, file.parent.name):
        if found := re.findall(r"(?:^|[_.\-])rank[_.\-]?(\d+)", name):
            return int(found[-1])
    return None


def check_whole(file: Path, facts: Facts) -> None:
    """Check that a single file holds a whole model.

    Raises:
      exits.Mistake: the file is one of several pieces, a pipeline stage, or of an unsupported Megatron version.
    """
    _check_kind(file, facts)
    if facts.pieces and facts.pieces > 1:
        raise exits.Mistake(f"{file}: states that it is one of {facts.pieces} tensor-parallel pieces; give all of them")
    if rank := rank_of(file):
        raise exits.Mistake(
            f"{file}: its name says tensor-parallel rank {rank}, but no lower rank is given; give all pieces, or rename the file if "
            "it holds the whole model"
        )


def order(files: Sequence[Path], facts: Mapping[Path, Facts]) -> list[Path]:
    """Sort the pieces by rank.

    Raises:
      exits.Mistake: a rank is unknown, contradictory, duplicate or missing, or the number of pieces differs from what a file states.
    """
    for file in files:
        _check_kind(file, facts[file])
        if (count := facts[file].pieces) and count != len(files):
            raise exits.Mistake(
                f"{file}: states that it is one of {count} tensor-parallel pieces, but {len(files)} are given; give all {count}"
            )
    told = _told(files, facts)
    ranks: dict[int, Path] = {}
    for file in files:
        named, inside = rank_of(file), told[file]
        if named is not None and inside is not None and named != inside:
            raise exits.Mistake(
                f"{file}: its name says rank {named}, but its content says rank {inside}; download it again"
            )
        rank = inside if named is None else named
        if rank is None:
            raise exits.Mistake(
                f"{file}: neither its name nor its content tells its tensor-parallel rank; name the pieces by rank: "
                "mp_rank_00_model_states.pt, mp_rank_01_model_states.pt, ..."
            )
        if rank in ranks:
            raise exits.Mistake(f"{ranks[rank]} and {file}: both are the piece of rank {rank}; give every piece once")
        ranks[rank] = file
    if missing := sorted(set(range(len(files))) - set(ranks)):
        held = ", ".join(map(str, sorted(ranks)))
        raise exits.Mistake(f"{files[0]}: the piece of rank {missing[0]} is missing (given: {held}); give all pieces")
    folders = {_folder(file) for file in files}
    if len(folders) > 1:
        one, two = sorted(map(str, folders))[:2]
        raise exits.Mistake(f"{one} and {two}: the pieces are in several folders; give only those of one model")
    return [ranks[rank] for rank in range(len(files))]


def _told(files: Sequence[Path], facts: Mapping[Path, Facts]) -> dict[Path, int | None]:
    """Rank by the content of each file. Tensor-parallel ranks vary fastest in the global ranks of a run."""
    processes = [facts[file].process for file in files]
    distinct = None not in processes and len(set(processes)) == len(files)
    told: dict[Path, int | None] = {}
    for file in files:
        rank, process, count, *_ = facts[file]
        if rank is None and process is not None and (count or distinct):
            rank = process % (count or len(files))
        told[file] = rank
    return told


def _check_kind(file: Path, facts: Facts) -> None:
    stage = re.search(r"(?:^|_)mp_rank_\d+_(\d+)(?:$|[_.])", f"{file.parent.name}/{file.name}".replace("/", "_"))
    if (facts.stages and facts.stages > 1) or (stage and int(stage[1])):
        raise exits.Mistake(
            f"{file}: holds one pipeline stage; merge the stages with the training program's tools first"
        )
    if facts.version is not None and facts.version < 2:
        raise exits.Mistake(
            f"{file}: has Megatron's checkpoint version {facts.version}, which orders q, k and v differently; load and save it with a "
            "Megatron that writes version 2.0 or later"
        )


def _folder(file: Path) -> Path:
    """Folder of the whole set. Megatron may put each piece into its own subfolder."""
    return file.parent.parent if re.fullmatch(r"mp_rank_\d+(_\d+)?", file.parent.name) else file.parent
