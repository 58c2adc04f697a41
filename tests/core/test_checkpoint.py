"""Checkpoints store a checksum of every leaf; damage is detected on reading, on any mesh, and reported in one line."""

import contextlib
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import tiny
import trees
from ymplug_jax.convert import leaves
from ymplug_jax.core import checkpoint, checkpoint_files, exits, stored_params, verified_read
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.exits import PlaceFailed
from ymplug_jax.training import setup

FROZEN = ("vision/.*", "llm/token_embed")


@functools.cache
def prepare(devices: int = 1, dtype: str = "float32", **mesh) -> setup.Run:
    return tiny.prepare(devices, train={"frozen": FROZEN, "frozen_dtype": dtype}, mesh=mesh)


def state_of(run: setup.Run) -> tuple[state_lib.TrainState, state_lib.Params]:
    """Random values of the state and the frozen tree, equal on every mesh and made without compilation."""
    rng = np.random.default_rng(0)

    def make(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(rng.normal(size=leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(make, (run.state, run.frozen))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with steps 5 and 10 of the same parameters, saved from eight devices."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    run = prepare(8, fsdp=2)
    state, frozen = state_of(run)
    checkpoints = checkpoint.Checkpoints(str(workdir))
    checkpoints.save_frozen(frozen)
    checkpoints.save(state, 5, 40)
    checkpoints.save(state.replace(trainable=jax.tree.map(lambda x: x + 1, state.trainable)), 10, 80)
    checkpoints.close()
    return workdir


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


def same(found, want) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(want)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), found, want))


def damage(folder: Path, how: Callable[[Path], None]) -> None:
    """Apply `how` to the files that hold values. Some are obsolete, and damage to them has no effect."""
    files = [file for file in (folder / "ocdbt.process_0" / "d").iterdir() if file.stat().st_size > 2000]
    assert files
    for file in files:
        how(file)


def overwrite(file: Path) -> None:
    """Overwrite 64 of every 512 bytes, since large parts of these files are obsolete."""
    data = bytearray(file.read_bytes())
    for place in range(256, len(data) - 64, 512):
        data[place : place + 64] = bytes(b ^ 0x55 for b in data[place : place + 64])
    file.write_bytes(data)


def cut(file: Path) -> None:
    """Truncate to 100 bytes, since all current data may lie in the first half."""
    file.write_bytes(file.read_bytes()[: min(100, file.stat().st_size // 2)])


def without_checksums(step: Path) -> None:
    """Turn a step into one saved by a version without checksums."""
    shutil.rmtree(step / "checksums")
    facts = json.loads((step / "_CHECKPOINT_METADATA").read_text())
    del facts["item_handlers"]["checksums"]
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps(facts))


def load(workdir: Path) -> dict[str, jax.Array]:
    run = prepare()
    return stored_params.load_params(str(workdir), state_lib.merge(run.state.trainable, run.frozen))


def restore(workdir: Path):
    return checkpoint.Checkpoints(str(workdir)).restore(prepare().state, 10)


def test_one_device_verifies_a_checkpoint_of_eight(saved: Path):
    state, seen = restore(saved)
    assert seen == 80 and int(state.step) == 10
    want, frozen = state_of(prepare())
    same(state.opt_state, want.opt_state)
    want = jax.tree.map(lambda x: x + 1, want.trainable)
    same(state.trainable, want)
    found = load(saved)
    same(state_lib.unflatten(found), state_lib.merge(want, frozen))


@pytest.mark.parametrize("how", [overwrite, cut, Path.unlink])
@pytest.mark.parametrize("read", [load, restore])
def test_error_names_the_damaged_parameter_and_the_newest_undamaged_step(copy: Path, how, read):
    damage(copy / "checkpoints" / "steps" / "10" / "trainable", how)
    with pytest.raises(checkpoint_files.CheckpointError) as error:
        read(copy)
    steps = copy / "checkpoints" / "steps"
    text = str(error.value)
    assert "\n" not in text and len(text) < 900
    assert text.startswith(f"{copy}: step 10: ") and "the newest undamaged step is 5" in text
    assert any(f": {path} is damaged: " in text for path in trees.stored_params(str(copy))), text
    command = f"mv {steps / '10'} {copy / 'checkpoints' / 'damaged_10'}"
    assert text.endswith(command)
    assert (steps / "10").exists()
    shutil.move(steps / "10", copy / "checkpoints" / "damaged_10")
    assert checkpoint_files.latest_step(str(copy)) == 5
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in load(copy).values())


@pytest.mark.parametrize(
    "file",
    [
        "steps/10/trainable/_METADATA",
        "steps/10/trainable/manifest.ocdbt",
        "steps/10/progress/metadata",
        "steps/10/checksums/metadata",
        "steps/10/opt_state/manifest.ocdbt",
    ],
)
@pytest.mark.parametrize("how", [cut, Path.unlink])
def test_unreadable_step_gives_a_one_line_error(copy: Path, file: str, how):
    how(copy / "checkpoints" / file)
    with pytest.raises(
        checkpoint_files.CheckpointError, match=r"^[^\n]* step 10: [^\n]*the newest undamaged step is 5[^\n]*$"
    ):
        restore(copy)


def test_step_without_trainable_parameters_is_damaged(copy: Path):
    shutil.rmtree(copy / "checkpoints" / "steps" / "10" / "trainable")
    with pytest.raises(checkpoint_files.CheckpointError, match="the newest undamaged step is 5"):
        load(copy)


def test_optimizer_state_is_verified(copy: Path):
    damage(copy / "checkpoints" / "steps" / "10" / "opt_state", overwrite)
    with pytest.raises(checkpoint_files.CheckpointError, match=r"step 10: .*the newest undamaged step is 5"):
        restore(copy)
    assert len(load(copy)) > 50  # evaluation does not read the optimizer state


def test_frozen_parameters_are_verified(copy: Path):
    damage(copy / "checkpoints" / "frozen", overwrite)
    with pytest.raises(
        checkpoint_files.CheckpointError, match=f"(vision|llm)/.* is damaged: .*every step of {copy} is damaged"
    ):
        load(copy)


def test_an_export_verifies_a_run_by_its_own_checksums(copy: Path):
    assert len(leaves.verified(copy)) == len(trees.stored_params(str(copy))) > 50
    sums = copy / "checkpoints" / "steps" / "10" / "checksums" / "metadata"
    content = json.loads(sums.read_text())
    name, value = next((n, v) for n, v in content["trainable"].items() if v.startswith("float32"))
    content["trainable"][name] = value[:-1] + ("0" if value[-1] != "0" else "1")
    sums.write_text(json.dumps(content))
    with pytest.raises(exits.Mistake, match=f"steps/10/trainable: {name} is damaged, its checksum is wrong"):
        leaves.verified(copy)
    damage(copy / "checkpoints" / "frozen", Path.unlink)
    with pytest.raises(exits.Mistake, match=r"checkpoints/frozen: .*(damaged|cannot be read)"):
        leaves.verified(copy)


def test_leaf_of_another_dtype_is_verified_before_the_cast(copy: Path):
    run = prepare(dtype="bfloat16")
    found = stored_params.load_params(str(copy), run.frozen)
    want = load(copy)
    assert found["llm/token_embed"].dtype == "bfloat16"
    assert all(np.array_equal(np.asarray(found[p]), np.asarray(want[p]).astype("bfloat16")) for p in found)
    damage(copy / "checkpoints" / "frozen", overwrite)
    with pytest.raises(checkpoint_files.CheckpointError, match="is damaged"):
        stored_params.load_params(str(copy), run.frozen)


def test_checkpoint_without_checksums_is_read_with_a_warning(copy: Path, caplog: pytest.LogCaptureFixture):
    for step in (5, 10):
        without_checksums(copy / "checkpoints" / "steps" / str(step))
    assert len(load(copy)) > 50 and "saved without checksums" in caplog.text
    restore(copy)


@pytest.mark.parametrize("read", [load, restore])
def test_missing_checksums_item_is_detected(copy: Path, read: Callable[[Path], object]):
    shutil.rmtree(copy / "checkpoints" / "steps" / "10" / "checksums")
    with pytest.raises(checkpoint_files.CheckpointError) as caught:
        read(copy)
    assert "step 10: its item 'checksums' is damaged: saved with the step but missing (" in str(caught.value)
    assert "the newest undamaged step is 5; to resume from it" in str(caught.value)


def test_fingerprint_depends_on_the_weights_only(saved: Path, copy: Path, tmp_path: Path):
    first = checkpoint_files.fingerprint(str(saved))
    assert len(first) == 64 and checkpoint_files.fingerprint(str(copy)) == first
    shutil.rmtree(copy / "checkpoints" / "steps" / "10")
    fifth = checkpoint_files.fingerprint(str(copy))
    assert fifth != first
    without_checksums(copy / "checkpoints" / "steps" / "5")
    assert checkpoint_files.fingerprint(str(copy)) not in (first, fifth)
    with pytest.raises(checkpoint_files.CheckpointError, match="no checkpoint here"):
        checkpoint_files.fingerprint(str(tmp_path / "nothing"))


def test_frozen_parameters_of_a_run_that_never_saved_are_replaced(tmp_path: Path):
    state, frozen = state_of(prepare())
    for add in (1, 2):
        other = jax.tree.map(lambda x, add=add: x + add, frozen)
        checkpoints = checkpoint.Checkpoints(str(tmp_path))
        checkpoints.save_frozen(other)
    checkpoints.save(state, 3, 24)
    checkpoints.close()
    found = load(tmp_path)
    assert np.array_equal(found["llm/token_embed"], frozen["llm"]["token_embed"] + 2)


def test_a_table_with_another_number_of_axes_is_not_resized(tmp_path: Path):
    state, frozen = state_of(prepare())
    checkpoints = checkpoint.Checkpoints(str(tmp_path))
    checkpoints.save_frozen(frozen)
    checkpoints.save(state, 3, 24)
    checkpoints.close()
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    size = frozen["llm"]["token_embed"].shape
    for shape, message in (((1, *size), r"other shape: llm/token_embed"), ((size[0] + 1, size[1]), "")):
        wanted = {"llm": {"token_embed": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)}}
        grown = {"llm/token_embed": lambda x, shape: jnp.resize(x, shape)}
        with pytest.raises(checkpoint_files.CheckpointError, match=message) if message else contextlib.nullcontext():
            found = stored_params.load_params(str(tmp_path), wanted, resize=grown)
            assert found["llm/token_embed"].shape == shape


def test_unreadable_first_save_stops_the_run(tmp_path: Path):
    """Orbax writes to such a folder without an error, but cannot read it back."""
    state, frozen = state_of(prepare())
    checkpoints = checkpoint.Checkpoints(str(tmp_path / "run[1]"))
    with pytest.raises(PlaceFailed, match="frozen: saved, but cannot be read back"):
        checkpoints.save_frozen(frozen)
    with pytest.raises(PlaceFailed, match="trainable: saved, but cannot be read back"):
        checkpoints.save(state, 5, 40)


def test_names_of_folders_in_init_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/lr=1e-3", "a,b", "c,llm=d", "x:y"):
        Path(name).mkdir(parents=True)
    sources = checkpoint_files.sources
    assert sources("") == sources(" , ") == []
    for folder in (
        "runs/lr=1e-3",
        f"{tmp_path}/runs/lr=1e-4",
        "./lr=1",
        "~/lr=1",
        "gs://b/lr=1e-3",
        "a,b",
        "c,llm=d",
        "x:y",
    ):
        assert sources(folder) == [("", "", folder)]
    assert sources("llm=runs/lr=1e-3,vision=gs://b/a=2") == [
        ("llm", "llm", "runs/lr=1e-3"),
        ("vision", "vision", "gs://b/a=2"),
    ]
    assert sources("llm=a,b, vision=x:y") == [("llm", "llm", "a,b"), ("vision", "vision", "x:y")]
    assert sources("prompter:=a,b") == [("prompter", "", "a,b")]
    assert sources("vision/t:vision/s=DIR") == [("vision/t", "vision/s", "DIR")]
    with pytest.raises(checkpoint_files.CheckpointError, match="llm= has no folder"):
        sources("llm=")


def test_error_names_damaged_leaves_only(tmp_path: Path):
    """A truncated file damages some leaves. Errors name these only; the others can still be read one by one."""
    rng, folder = np.random.default_rng(0), epath.Path(tmp_path) / "item"
    tree = {name: {"kernel": jnp.asarray(rng.standard_normal(60_000), jnp.float32)} for name in "abcdef"}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        # A leaf of 240 kB ends a file: otherwise timing decides whether one file holds them all.
        writer.save(folder, args=ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=100_000))
    cut(max((file for file in tmp_path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {name: {"kernel": jax.ShapeDtypeStruct((60_000,), jnp.float32, sharding=place)} for name in tree}
    whole = []
    for name in tree:
        with contextlib.suppress(verified_read.Damaged):
            found = verified_read.read(folder, {name: wanted[name]}, None)
            whole += [name] * bool(jnp.array_equal(found[name]["kernel"], tree[name]["kernel"]))
    assert 0 < len(whole) < len(tree)
    with pytest.raises(verified_read.Damaged) as error:
        verified_read.read(folder, wanted, None)
    assert error.value.what in {f"{name}/kernel" for name in tree if name not in whole}


def test_steps_left_by_a_kill_are_deleted(copy: Path) -> None:
    """A process killed between its last save and the deletion of older steps leaves one too many."""
    for keep, left in ((2, {5, 10}), (1, {10})):
        with contextlib.closing(checkpoint.Checkpoints(str(copy), keep=keep)) as checkpoints:
            checkpoints.keep_newest()
        assert set(checkpoint_files.steps_of(copy)) == left
    assert not list((copy / "checkpoints" / "steps").glob("5*"))
