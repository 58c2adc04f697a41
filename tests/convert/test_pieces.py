"""Tensor-parallel pieces and sharded files: order by rank, duplicates, and files of different models."""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ymplug_jax.convert import mplug_video, pieces
from ymplug_jax.convert.torch_file import Source
from ymplug_jax.core import exits

EMBED = "language_model.embedding.word_embeddings.weight"
DOWN = "language_model.encoder.layers.0.mlp.dense_4h_to_h.weight"
NORM = "language_model.encoder.final_layernorm.weight"
# The embedding is split along axis 0 and the projection along axis 1; the norm is copied to every piece.
WHOLE = {
    EMBED: torch.arange(24, dtype=torch.float32).reshape(12, 2),
    DOWN: torch.arange(100, 124, dtype=torch.float32).reshape(2, 12),
    NORM: torch.tensor([1.0, 1.5]),
}


def tensors(rank: int, count: int) -> dict[str, torch.Tensor]:
    cut = {EMBED: WHOLE[EMBED].chunk(count, 0)[rank], DOWN: WHOLE[DOWN].chunk(count, 1)[rank], NORM: WHOLE[NORM]}
    return {name: value.clone() for name, value in cut.items()}


def save(file: Path, rank: int, count: int, **more: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": tensors(rank, count), **more}, file)
    return file


def opened(*files: Path) -> Source:
    source = Source(list(files), mplug_video.MERGE)
    source.check_pieces()
    return source


def whole(source: Source) -> bool:
    return all(np.array_equal(source.read(name), value.numpy()) for name, value in WHOLE.items())


def refused(message: str, *files: Path) -> None:
    with pytest.raises(exits.Mistake, match=message) as caught:
        opened(*files)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["mp_rank_{:02d}_model_states.pt", "mp_rank_{}_model_states.pt", "mp_rank_{:02d}/model_rng.pt", "gpt.rank-{}.pt"],
)
def test_ranks_in_names_order_the_pieces(tmp_path: Path, name: str) -> None:
    files = [save(tmp_path / name.format(rank), rank, 12) for rank in range(12)]
    assert opened(*files).notes == []
    for order in (files[::-1], sorted(files, key=str), files[5:] + files[:5]):
        source = opened(*order)
        assert whole(source) and source.files == files
        assert bool(source.notes) == (order != files)


@pytest.mark.parametrize(
    "held",
    [
        lambda rank, count: {"args": argparse.Namespace(rank=rank, tensor_model_parallel_size=count)},
        lambda rank, count: {"args": argparse.Namespace(rank=rank)},
        lambda rank, count: {"args": {"rank": count * 4 + rank, "tensor_model_parallel_size": count}},
        lambda rank, count: {"client_state": {"args": argparse.Namespace(rank=rank, model_parallel_size=count)}},
        lambda rank, count: {"mp_world_size": count, "mp_rank": rank},
    ],
)
def test_ranks_in_the_files_order_the_pieces(tmp_path: Path, held) -> None:
    files = [save(tmp_path / f"{name}.pt", rank, 3, **held(rank, 3)) for rank, name in ((1, "a"), (2, "b"), (0, "c"))]
    source = opened(*files)
    assert whole(source) and [file.name for file in source.files] == ["c.pt", "a.pt", "b.pt"]
    # Names that contradict the content.
    swapped = [tmp_path / f"mp_rank_0{i}_model_states.pt" for i in range(3)]
    for file, to in zip(files, swapped, strict=True):
        shutil.copy(file, to)
    refused("its name says rank 0, but its content says rank 1", *swapped)


def test_pieces_of_another_count(tmp_path: Path) -> None:
    four = [save(tmp_path / f"mp_rank_0{i}_model_states.pt", i, 4, mp_world_size=4) for i in range(4)]
    assert whole(opened(*four))
    refused("states that it is one of 4 tensor-parallel pieces, but 2 are given; give all 4", *four[:2])
    refused("states that it is one of 4 tensor-parallel pieces; give all of them", four[0])
    plain = [save(tmp_path / "plain" / f"mp_rank_0{i}_model_states.pt", i, 4) for i in range(4)]
    refused(r"the piece of rank 1 is missing \(given: 0, 2, 3\); give all pieces", plain[0], plain[2], plain[3])
    refused("the piece of rank 0 is missing", *plain[1:])
    refused("its name says tensor-parallel rank 1, but no lower rank is given; give all pieces", plain[1])


def test_a_piece_twice(tmp_path: Path) -> None:
    one, two = (save(tmp_path / f"mp_rank_0{i}_model_states.pt", i, 2) for i in range(2))
    refused("given twice; give every file once", one, one)
    (tmp_path / "link_rank_1.pt").symlink_to(one)
    refused("given twice", one, tmp_path / "link_rank_1.pt")
    copy = tmp_path / "copy" / "mp_rank_01_model_states.pt"
    copy.parent.mkdir()
    shutil.copy(one, copy)
    refused("the pieces are in several folders", one, copy)
    shutil.copy(one, two)
    refused("hold the same tensors; give every piece once", one, two)
    # The same tensors in another format: no byte of the files is equal.
    torch.save({"epoch": 3, "module": tensors(0, 2)}, two, _use_new_zipfile_serialization=False)
    refused("hold the same tensors; give every piece once", one, two)
    again = save(tmp_path / "mp_rank_0_again.pt", 0, 2)
    refused("both are the piece of rank 0", one, again)
    shutil.copy(one, tmp_path / "x.pt")
    shutil.copy(one, tmp_path / "y.pt")
    refused(
        "neither its name nor its content tells its tensor-parallel rank; name the pieces",
        tmp_path / "x.pt",
        tmp_path / "y.pt",
    )


def test_pieces_of_other_models_and_other_layouts(tmp_path: Path) -> None:
    one, two = (save(tmp_path / f"mp_rank_0{i}_model_states.pt", i, 2) for i in range(2))
    torch.save({"module": tensors(1, 2) | {NORM: torch.tensor([3.0, 1.5])}}, two)
    refused(f"{NORM} differs; give only the pieces of one model", one, two)
    torch.save({"module": tensors(1, 2) | {NORM: torch.tensor([1.0, 1.5001])}}, two)
    source = opened(one, two)
    assert whole(source) and "differs slightly" in source.notes[0]
    torch.save({"module": tensors(1, 2) | {EMBED: torch.zeros(6, 3)}}, two)
    refused(rf"\(6, 2\)\) and .*\(6, 3\)\): {EMBED} differs", one, two)
    torch.save({"module": {name: value.half() for name, value in tensors(1, 2).items()}}, two)
    refused("float32.* and .*float16.* differs; give only", one, two)
    torch.save({"module": tensors(1, 2) | {"extra": torch.zeros(2)}}, two)
    refused("both hold .*; give only the files of one model", one, two)
    for more, message in (
        ({"args": argparse.Namespace(pipeline_model_parallel_size=2)}, "holds one pipeline stage; merge"),
        ({"checkpoint_version": 1.0}, "Megatron's checkpoint version 1.0"),
    ):
        refused(message, save(tmp_path / "odd" / "mp_rank_00_model_states.pt", 0, 1, **more))
    refused("holds one pipeline stage; merge", save(tmp_path / "mp_rank_00_001" / "model_rng.pt", 0, 1))


def test_files_without_cut_tensors_are_no_pieces(tmp_path: Path) -> None:
    """Two formats of one model are not two pieces."""
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    refused(
        "both hold a; give only the files of one model", tmp_path / "pytorch_model.bin", tmp_path / "model.safetensors"
    )


def test_ranks_in_names() -> None:
    for name, rank in (
        ("mp_rank_00_model_states.pt", 0),
        ("model/mp_rank_13_model_states.pt", 13),
        ("iter_0000100/mp_rank_02/model_optim_rng.pt", 2),
        ("zero_pp_rank_0_mp_rank_03_optim_states.pt", 3),
        ("consolidated.rank1.pt", 1),
        ("pytorch_model.bin", None),
        ("model-00001-of-00002.safetensors", None),
        ("frank2.pt", None),
    ):
        assert pieces.rank_of(Path(name)) == rank, name


def shards(folder: Path, stem: str = "model", end: str = ".safetensors") -> tuple[list[Path], Path]:
    folder.mkdir(exist_ok=True)
    values = {"a": torch.ones(2), "b": torch.zeros(3)}
    files = [folder / f"{stem}-0000{i}-of-00002{end}" for i in (1, 2)]
    for file, (name, value) in zip(files, values.items(), strict=True):
        save_file({name: value}, file) if end == ".safetensors" else torch.save({name: value}, file)
    index = folder / f"{stem}{end}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": files[0].name, "b": files[1].name}}), encoding="utf-8-sig")
    return files, index


@pytest.mark.parametrize(("stem", "end"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_shards_are_given_whole(tmp_path: Path, stem: str, end: str) -> None:
    (one, two), index = shards(tmp_path / "x", stem, end)
    for given in ([index], [two, one], [tmp_path / "x"]):
        assert Source(given).shapes() == {"a": (2,), "b": (3,)}
    refused(f"belongs to a set of 2 files, of which 1 are given; give --source .*{index.name}", one)
    (other, _), _ = shards(tmp_path / "y", stem, end)
    refused("belong to two sets of files; give only those of one model", other, two)
    index.unlink()
    refused("of which 1 are given; give all 2, or their folder", two)
    two.unlink()
    refused("of which 1 are given", tmp_path / "x")


def test_an_index_of_another_model(tmp_path: Path) -> None:
    (one, two), index = shards(tmp_path)
    save_file({"c": torch.zeros(3)}, two)
    refused(f"{two.name}: lacks b, which the index lists in it; download the model's files again", index)
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, two)
    refused("both hold a; give only the files of one model", index)
    for text in ("", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "<!DOCTYPE html>"):
        index.write_text(text)
        refused("index.json: ", index)
    index.write_text(json.dumps({"weight_map": {"a": one.name, "b": "model-00009-of-00002.safetensors"}}))
    refused("1 of its 2 files are missing, the first is model-00009.*; download them", index)
