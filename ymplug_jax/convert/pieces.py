"""Order of tensor-parallel pieces, by the ranks in their names and in what their program stored beside the tensors."""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ymplug_jax.core import exits

# How Megatron and DeepSpeed call them.
_COUNT = ("tensor_model_parallel_size", "mp_world_size", "model_parallel_size")
_RANK = ("tensor_model_parallel_rank", "tensor_rank", "model_parallel_rank", "mp_rank")
_STAGES = ("pipeline_model_parallel_size", "pipe_parallel_size")


class Facts(NamedTuple):
    """What a file says of itself; None where it says nothing."""

    rank: int | None = None  # among the pieces
    process: int | None = None  # rank among all processes of the run that wrote it
    count: int | None = None  # pieces of the model
    stages: int | None = None  # of pipeline parallelism
    version: float | None = None  # of Megatron's layout


def facts_of(loaded: Any) -> Facts:
    """Ranks and sizes that a training program stored at the top of its file, or in the settings of its run."""
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
    """The rank in a file's name, or in that of its folder as Megatron has it: mp_rank_01_model_states.pt, mp_rank_01/model_rng.pt."""
    for name in (file.name, file.parent.name):
        if found := re.findall(r"(?:^|[_.\-])rank[_.\-]?(\d+)", name):
            return int(found[-1])
    return None


def check_whole(file: Path, facts: Facts) -> None:
    """A single file holds all of its model.

    Raises:
      exits.Mistake: it says that it is one of several pieces, or one that no table is for.
    """
    _check_kind(file, facts)
    if facts.count and facts.count > 1:
        raise exits.Mistake(f"{file}: one of {facts.count} tensor-parallel pieces by its own account; give all of them")
    if rank := rank_of(file):
        raise exits.Mistake(
            f"{file}: the tensor-parallel piece of rank {rank} by its name, without those before it; give all pieces, or rename it "
            "if it is a whole model"
        )


def order(files: Sequence[Path], facts: Mapping[Path, Facts]) -> list[Path]:
    """The pieces by rank.

    Raises:
      exits.Mistake: ranks that are unknown, contradictory, double or missing, or another number of pieces than the files say.
    """
    for file in files:
        _check_kind(file, facts[file])
        if (count := facts[file].count) and count != len(files):
            raise exits.Mistake(
                f"{file}: one of {count} tensor-parallel pieces by its own account, but {len(files)} files are given; give all {count}"
            )
    told = _told(files, facts)
    ranks: dict[int, Path] = {}
    for file in files:
        named, inside = rank_of(file), told[file]
        if named is not None and inside is not None and named != inside:
            raise exits.Mistake(
                f"{file}: rank {named} by its name but rank {inside} by what it holds, so it was renamed or replaced; fetch it again"
            )
        rank = inside if named is None else named
        if rank is None:
            raise exits.Mistake(
                f"{file}: neither its name nor what it holds tells the rank of this tensor-parallel piece; name the pieces in the "
                "order of their ranks: mp_rank_00_model_states.pt, mp_rank_01_model_states.pt, ..."
            )
        if rank in ranks:
            raise exits.Mistake(f"{ranks[rank]} and {file} are both the piece of rank {rank}; give every piece once")
        ranks[rank] = file
    if missing := sorted(set(range(len(files))) - set(ranks)):
        held = ", ".join(map(str, sorted(ranks)))
        raise exits.Mistake(f"{files[0]}: the piece of rank {missing[0]} is missing; given are ranks {held}")
    folders = {_folder(file) for file in files}
    if len(folders) > 1:
        one, two = sorted(map(str, folders))[:2]
        raise exits.Mistake(f"the pieces stand in several folders, {one} and {two}; give those of one model only")
    return [ranks[rank] for rank in range(len(files))]


def _told(files: Sequence[Path], facts: Mapping[Path, Facts]) -> dict[Path, int | None]:
    """Rank by what each file holds. Of the processes of a run the pieces of one model follow each other."""
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
            f"{file}: holds one stage of a pipeline; merge the stages with the tools of its program first"
        )
    if facts.version is not None and facts.version < 2:
        raise exits.Mistake(
            f"{file}: Megatron's layout {facts.version}, which orders q, k and v otherwise; load and save it with Megatron 2.0 or later first"
        )


def _folder(file: Path) -> Path:
    """Of the whole set: Megatron's folder of a piece stands in it."""
    return file.parent.parent if re.fullmatch(r"mp_rank_\d+(_\d+)?", file.parent.name) else file.parent
