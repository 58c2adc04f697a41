"""The conversion command: released files, exact round trips, resuming, and no code from a file runs."""

import json
import pickle
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.torch import load_file, save_file

import trees
from ymplug_jax.convert import __main__ as command
from ymplug_jax.convert import mplug_video as tables
from ymplug_jax.convert import rules, to_orbax
from ymplug_jax.core import state, stored_params

GOLDEN = Path(__file__).parents[1] / "golden" / "mplug_video_gpt3"
HEADS = ["--heads", "llm=4", "vision=4"]


def tensors(file: str) -> dict[str, "torch.Tensor"]:
    with np.load(GOLDEN / file) as arrays:
        return {k.removeprefix("param/"): torch.from_numpy(arrays[k]) for k in arrays if k.startswith("param/")}


def convert(model: str, *sources: Path, out: Path, more: tuple[str, ...] = (), code: int = 0) -> None:
    argv = ["--model", model, "--source", *map(str, sources), "--out", str(out), *more]
    assert command.main(argv) == code


def loaded(folder: Path) -> dict[str, np.ndarray]:
    """The parameters as `init_from` reads them."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    stored = trees.stored_params(str(folder))
    abstract = {k: jax.ShapeDtypeStruct(tuple(v.shape), v.dtype, sharding=place) for k, v in stored.items()}
    return {k: np.asarray(v) for k, v in stored_params.load_params(str(folder), state.unflatten(abstract)).items()}


@pytest.mark.parametrize("file", ["pretrain.npz", "cls.npz", "retrieval.npz", "retrieval_itm.npz", "caption.npz"])
def test_release_files_of_every_task_there_and_back(tmp_path: Path, file: str) -> None:
    source = tensors(file)
    torch.save(
        {"module": {f"module.{name}": value for name, value in source.items()}}, tmp_path / "mp_rank_00_model_states.pt"
    )
    convert("mplug_video", tmp_path / "mp_rank_00_model_states.pt", out=tmp_path / "orbax", more=HEADS)
    found = loaded(tmp_path / "orbax")
    plan = tables.plan({name: tuple(value.shape) for name, value in source.items()}, {"llm": 4, "vision": 4})
    expected = flatten_dict(
        trees.to_tree(tables.MPLUG_VIDEO, {k: v.numpy() for k, v in source.items()}, plan.like), sep="/"
    )
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)
    convert("mplug_video", tmp_path / "orbax", out=tmp_path / "back", more=("--to", "torch"))
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == source.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in source.items())
    facts = json.loads((tmp_path / "orbax" / "conversion.json").read_text())
    assert len(facts["sources"]["mp_rank_00_model_states.pt"]) == 64 and facts["model"] == "mplug_video"


def pieces_of(source: dict[str, "torch.Tensor"], count: int) -> list[dict[str, "torch.Tensor"]]:
    """Tensor-parallel pieces, split as Megatron does."""
    import re

    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(count)]
    for name, value in source.items():
        axis = next((a for pattern, a in tables.MERGE.items() if re.fullmatch(pattern, name)), None)
        cut = value.chunk(count, dim=axis) if axis is not None else [value] * count
        for part, piece in zip(parts, cut, strict=True):
            part[name] = piece.clone()
    return parts


def test_tensor_parallel_pieces_are_put_together(tmp_path: Path) -> None:
    source = {name.removeprefix("dist_model."): value.to(torch.bfloat16) for name, value in tensors("beam.npz").items()}
    torch.save({"module": source}, tmp_path / "one.pt")
    files = []
    for i, part in enumerate(pieces_of(source, 2)):
        files.append(tmp_path / f"mp_rank_0{i}_model_states.pt")
        torch.save({"module": part}, files[-1])
    convert("gpt3", tmp_path / "one.pt", out=tmp_path / "a", more=HEADS)
    convert("gpt3", *files, out=tmp_path / "b", more=HEADS)
    one, two = loaded(tmp_path / "a"), loaded(tmp_path / "b")
    assert one.keys() == two.keys() and all(path.startswith("llm/") for path in one)
    for path, value in one.items():
        assert value.dtype.name == "bfloat16"
        np.testing.assert_array_equal(two[path], value)


def test_a_single_piece_is_not_taken_for_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source = {name.removeprefix("dist_model."): value for name, value in tensors("beam.npz").items()}
    torch.save({"module": pieces_of(source, 2)[0]}, tmp_path / "mp_rank_00_model_states.pt")
    convert("gpt3", tmp_path / "mp_rank_00_model_states.pt", out=tmp_path / "a", more=HEADS, code=2)
    assert "one of several tensor-parallel pieces" in capsys.readouterr().err
    assert not (tmp_path / "a" / "checkpoints" / "converted").exists()


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.write_text, (self.marker, "x"))


def test_nothing_in_a_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    marker = tmp_path / "it ran"
    torch.save({"module": {"a": torch.zeros(1)}, "evil": Evil(marker)}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps({"evil": Evil(marker)}))
    for name in ("a.pt", "b.pt"):
        convert("gpt3", tmp_path / name, out=tmp_path / "x", code=2)
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
        assert "unpickling it could run any code" in line or "not a file of torch.save" in line
    assert not marker.exists()


def test_a_bucket_is_not_taken_for_a_folder(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--model", "gpt3", "--source", "x.pt", "--out", "gs:/bucket/out"])
    assert "gs:/bucket/out: not a place; write gs://bucket/out" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_broken_files_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, suffix: str) -> None:
    source, file = tensors("beam.npz"), tmp_path / f"x.{suffix}"
    torch.save(source, file) if suffix == "pt" else save_file(source, file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    convert("gpt3", file, out=tmp_path / "out", code=2)
    assert "damaged or truncated" in capsys.readouterr().err
    convert("gpt3", tmp_path / "nowhere.pt", out=tmp_path / "out", code=2)
    assert "no such file" in capsys.readouterr().err


def test_missing_and_unexpected_tensors_are_listed_and_can_be_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tensors("pretrain.npz")
    del source["attn_pool.norm1.bias"]
    source["extra.weight"] = torch.zeros(2)
    torch.save(source, tmp_path / "x.pt")
    convert("mplug_video", tmp_path / "x.pt", out=tmp_path / "out", more=HEADS, code=2)
    error = capsys.readouterr().err
    assert "missing: attn_pool.norm1.bias" in error and "unexpected: extra.weight" in error
    allowed = (*HEADS, "--allow_missing", r"attn_pool\.norm1\..*", "--allow_unexpected", r"extra\..*")
    convert("mplug_video", tmp_path / "x.pt", out=tmp_path / "out", more=allowed)
    assert "abstractor/query_norm/bias" not in trees.stored_params(str(tmp_path / "out"))
    convert("mplug_video", tmp_path / "x.pt", out=tmp_path / "out", more=allowed, code=2)
    assert "checkpoints/converted exists; remove it" in capsys.readouterr().err


def test_a_stopped_conversion_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    torch.save(tensors("pretrain.npz"), tmp_path / "x.pt")
    real, count, killed_at = to_orbax.Store.write, 0, 0

    def counting(*args) -> None:
        nonlocal count
        count += 1
        if count == killed_at:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(to_orbax.Store, "write", counting)
    convert("mplug_video", tmp_path / "x.pt", out=tmp_path / "whole", more=HEADS)
    everything, count, killed_at = count, 0, 40
    capsys.readouterr()
    convert("mplug_video", tmp_path / "x.pt", out=tmp_path / "out", more=HEADS, code=130)
    assert capsys.readouterr().err.splitlines()[-1] == "stopped; run the same command again to continue"
    assert not (tmp_path / "out" / "checkpoints" / "converted").exists()
    count, killed_at = 0, 0
    convert("mplug_video", tmp_path / "x.pt", out=tmp_path / "out", more=HEADS)
    assert everything - 40 <= count < everything - 30  # the parameters already on disk are not written again
    one, two = loaded(tmp_path / "whole"), loaded(tmp_path / "out")
    assert one.keys() == two.keys() and all(np.array_equal(one[path], two[path]) for path in one)


def test_an_image_tower_starts_a_pretraining(tmp_path: Path) -> None:
    """CLIP initialises the spatial parameters; temporal ones stay fresh; the text tower and the key biases are dropped."""
    from ymplug_jax.convert import clip
    from ymplug_jax.core import config
    from ymplug_jax.models import mplug_video
    from ymplug_jax.training import setup

    model = mplug_video.sized("tiny", "tiny", queries=4)
    like = jax.eval_shape(lambda: mplug_video.init(model, jax.random.key(0)))["vision"]
    like = {k: v for k, v in like.items() if k != "temporal_embed"}
    like["blocks"] = {k: v for k, v in like["blocks"].items() if not k.startswith("temporal")}
    rng = np.random.default_rng(0)
    source = {
        name: torch.from_numpy(rng.normal(size=entry.shape).astype(np.float32))
        for name, entry in rules.expand(clip.HUGGING_FACE, like).items()
    }
    width = model.vision.width
    dead = {f"vision_model.encoder.layers.{i}.self_attn.k_proj.bias": torch.zeros(width) for i in range(2)}
    dead |= {"text_model.final_layer_norm.weight": torch.ones(8), "logit_scale": torch.tensor(2.6)}
    save_file(source | dead, tmp_path / "model.safetensors")
    convert("clip", tmp_path / "model.safetensors", out=tmp_path / "clip", more=HEADS)
    assert json.loads((tmp_path / "clip" / "conversion.json").read_text())["dropped"] == sorted(dead)
    experiment = config.Experiment(
        task="pretrain",
        model=model,
        data=config.Data(image_size=64, max_tokens=8, examples=64),
        optim=config.Optim(warmup="1 steps"),
        train=config.Train(init_from=f"vision={tmp_path / 'clip'}", frozen_dtype="float32"),
    )
    run = setup.prepare(experiment, jax.devices()[:1])
    params, origin = setup.fresh_params(run)
    np.testing.assert_array_equal(params["vision"]["cls"], source["vision_model.embeddings.class_embedding"])
    patch = source["vision_model.embeddings.patch_embedding.weight"].numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(params["vision"]["patch"]["kernel"], patch)
    assert (
        origin["vision/temporal_embed"] == "fresh"
        and origin["vision/cls"] == "clip"
        and origin["connector/proj/bias"] == "fresh"
    )
    convert("clip", tmp_path / "clip", out=tmp_path / "back", more=("--to", "torch"))
    back = load_file(tmp_path / "back" / "model.safetensors")
    zeros = {name for name in dead if name.endswith("k_proj.bias")}
    assert back.keys() == source.keys() | zeros and all(
        torch.equal(back[name], value) for name, value in source.items()
    )
    assert not any(back[name].any() for name in zeros)
