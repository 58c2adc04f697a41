"""Int8 quantisation of frozen matrices: accuracy, sharding, training and checkpoints."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

import runs
from benchmarks import int8_error
from tests import tiny
from ymplug_jax.analysis import aot, estimate
from ymplug_jax.core import checkpoint, leaf_checksums, quantize, quantized_read, state, stored_params, verified_read
from ymplug_jax.models import bert, language_models, timesformer
from ymplug_jax.models.alpro import ALPRO
from ymplug_jax.models.bert import Fusion, Text
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.training import parameter_table, setup
from ymplug_jax.training import step as step_lib


def ready(devices: int = 1, dtype: str = "int8", **mesh: int):
    run = tiny.prepare(devices, train={"frozen_dtype": dtype}, mesh=mesh)
    now, frozen, _ = setup.fresh_state(run)
    return run, now, frozen


def test_every_value_is_within_half_a_step_of_its_channel() -> None:
    run, _, frozen = ready()
    stored, held = state.flatten(frozen), state.flatten(setup.hold(run, frozen))
    eight = {path for path, leaf in held.items() if isinstance(leaf, quantize.Quantized)}
    kernels = {"attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down"}
    assert eight == {f"llm/blocks/{name}/kernel" for name in kernels}
    for path in eight:
        exact, leaf = np.asarray(stored[path], np.float32), held[path]
        assert leaf.values.dtype == jnp.int8 and leaf.shape == exact.shape
        scale = np.asarray(leaf.scale, np.float32)
        error = np.abs(np.asarray(leaf.values, np.float32) * scale - exact)
        assert (error <= 0.51 * scale + 0.005 * np.abs(exact)).all(), path  # the scale itself is rounded to bfloat16
        channels = exact.size // leaf.scale.size
        assert channels in (32, 128) and leaf.scale.shape[0] == 2  # contracted axes; one scale per output channel
    for path in stored.keys() - eight:
        np.testing.assert_array_equal(held[path], stored[path])


def test_a_channel_of_zeros_stays_zero() -> None:
    made = quantize.quantized(jnp.zeros((2, 4, 3), jnp.bfloat16), (1,))
    np.testing.assert_array_equal(quantize.matrix(made), 0)


def test_abstract_and_held_trees_agree() -> None:
    run, _, frozen = ready(8, fsdp=2, tensor=2)
    held = setup.hold(run, frozen)
    for wanted, made in zip(jax.tree.leaves(run.held), jax.tree.leaves(held), strict=True):
        assert (wanted.shape, wanted.dtype) == (made.shape, made.dtype)
        assert wanted.sharding.is_equivalent_to(made.sharding, made.ndim)


@pytest.mark.parametrize(("devices", "mesh"), [(8, {"fsdp": 2, "tensor": 2})])
def test_matrices_quantised_while_they_are_read_equal_those_held(
    devices: int, mesh: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a run's folder and from `init_from`, in slices of one layer; the stored copy of a new run keeps bfloat16."""
    monkeypatch.setattr(quantized_read, "SLICE", 2**14)
    run, now, frozen = ready(devices, **mesh)
    expected = state.flatten(setup.hold(run, frozen))

    def saved(folder: Path, run, now, frozen) -> checkpoint.Checkpoints:
        made = checkpoint.Checkpoints(str(folder))
        made.save_frozen(frozen, run.frozen)
        made.save(now, 1, 1)
        made.wait()
        return made

    saved(tmp_path / "one", run, now, frozen)
    train = {"frozen_dtype": "int8", "init_from": str(tmp_path / "one")}
    later = tiny.prepare(devices, train=train, mesh=mesh)
    now, waiting, _ = setup.fresh_state(later)
    on_host = {path for path, leaf in state.flatten(waiting).items() if isinstance(leaf, np.ndarray)}
    assert on_host == {path for path, leaf in expected.items() if isinstance(leaf, quantize.Quantized)}
    second = saved(tmp_path / "two", later, now, waiting)
    resumed = setup.initialise(later, second)[1]
    for found in (
        stored_params.load_params(str(tmp_path / "one"), run.held),
        state.flatten(setup.hold(later, waiting)),
        state.flatten(resumed),
    ):
        assert found.keys() == expected.keys()
        for path, leaf in expected.items():
            for one, two in zip(jax.tree.leaves(leaf), jax.tree.leaves(found[path]), strict=True):
                assert one.dtype == two.dtype and one.sharding.is_equivalent_to(two.sharding, one.ndim), path
                np.testing.assert_array_equal(one, two, err_msg=path)
    stored = stored_params.load_params(str(tmp_path / "two"), run.frozen)
    for path, leaf in state.flatten(frozen).items():
        np.testing.assert_array_equal(stored[path], leaf)


def test_damage_is_found_while_quantising(tmp_path: Path) -> None:
    run, _, frozen = ready()
    like = state.flatten(run.held)
    paths = ("llm/blocks/mlp/up/kernel", "llm/norm/scale")
    for path in paths:
        folder = tmp_path / path.replace("/", ".")
        store = {path: state.flatten(frozen)[path]}
        with ocp.StandardCheckpointer() as writer:
            writer.save(folder, state.unflatten(store))
        place, sums = epath.Path(folder), leaf_checksums.of_tree(store)
        assert quantized_read.read(place, {path: like[path]}, sums).keys() == {path}
        wrong = {path: leaf_checksums.of(store[path] + 1)}
        with pytest.raises(verified_read.Damaged, match="differs from what was saved"):
            quantized_read.read(place, {path: like[path]}, wrong)
        with pytest.raises(verified_read.Damaged, match="no checksum stored"):
            quantized_read.read(place, {path: like[path]}, {})


def test_slices_of_a_leaf_have_its_checksum() -> None:
    array = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 3)), jnp.bfloat16)
    parts = [np.asarray(leaf_checksums.slice_sums(array[i : i + 2], i)) for i in range(0, 6, 2)]
    total = np.sum(parts, axis=0, dtype=np.uint32)
    assert leaf_checksums.text(array.dtype, array.shape, total) == leaf_checksums.of(array)


def test_int8_changes_logits_by_little() -> None:
    found = int8_error.measure(int8_error.SIZES["tiny"], rows=2, length=32)
    assert 0 < found["change_rms"] < 0.02 * found["logits_rms"]
    assert abs(found["loss_int8"] - found["loss"]) < 0.01


def test_train_step_equals_that_of_the_dequantised_weights() -> None:
    """Loss and gradients equal those with the products values * scale as weights, and are close to those of the exact weights.

    Equality is up to the rounding of the product to bfloat16, which XLA may omit.
    """
    run, now, frozen = ready()
    plain = tiny.prepare(1, train={"frozen_dtype": "bfloat16"})
    held = setup.hold(run, frozen)
    flat = state.flatten(held)
    by_hand = state.unflatten({k: quantize.matrix(v) for k, v in flat.items()})
    batch, losses, grads = tiny.batch(run), [], []
    for which, tree in ((run, held), (plain, by_hand), (plain, frozen)):

        def loss(trainable, which=which, tree=tree):
            return which.task.loss(state.merge(trainable, tree), batch, None)[0]

        value, grad = jax.jit(jax.value_and_grad(loss))(now.trainable)
        losses.append(float(value))
        grads.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grad)]))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    np.testing.assert_allclose(grads[0], grads[1], atol=5e-3 * np.abs(grads[1]).max())
    np.testing.assert_allclose(losses[0], losses[2], rtol=2e-2)
    assert np.dot(grads[0], grads[2]) > 0.99 * np.linalg.norm(grads[0]) * np.linalg.norm(grads[2])


VIDEO = (2, 2, 16, 16, 3)
TOWER = TimeSformer(image_size=16, patch_size=8, depth=2, width=16, heads=2, frames=2, dtype="bfloat16")
TEXT = Text(vocab=64, width=32, depth=2, heads=2, hidden=48, max_positions=24, dtype="bfloat16")
ALPRO_MODEL = ALPRO(
    vision=TOWER.clone(clip=False), text=TEXT, fusion=Fusion(depth=1, heads=2, hidden=48, dtype="bfloat16"),
    contrastive_width=8, entities=3, variant="salesforce",
)  # fmt: skip


def decoder(kind: str, **fields):
    """Return (model, its AXES, forward pass over three rows of tokens)."""
    ids = jnp.asarray(np.random.default_rng(1).integers(3, 64, (3, 12)))
    known = language_models.TABLE[kind]
    model = known.module(vocab=64, width=32, depth=2, heads=4, dtype="bfloat16", **fields)
    return model, known.axes, lambda llm: llm.logits(llm(llm.embed(ids)))


def tower(model, axes, *inputs):
    return model, axes, lambda bound: bound(*inputs)


def video() -> jax.Array:
    return jnp.asarray(np.random.default_rng(2).normal(size=VIDEO), jnp.float32)


# All modules with stacked blocks; a config can freeze any of them by path.
SUBTREES = {
    "gpt3": lambda: decoder("gpt3", max_positions=32),
    "bloom with adapters": lambda: decoder("bloom", lora_rank=4),
    "qwen2": lambda: decoder("qwen", kv_heads=2, head_dim=16, mlp=64, tied=False),
    "qwen3": lambda: decoder("qwen", kv_heads=2, head_dim=16, mlp=64, qkv_bias=False, qk_norm=True),
    "vision": lambda: tower(TOWER, timesformer.AXES, video()),
    "text": lambda: tower(TEXT, bert.TEXT_AXES, jnp.arange(24).reshape(2, 12), jnp.ones((2, 12), bool)),
    "fusion": lambda: tower(
        ALPRO_MODEL.fusion, bert.FUSION_AXES, jax.random.normal(jax.random.key(3), (2, 9, 32)), jnp.ones((2, 9), bool)
    ),
}


def rounded(path: str, leaf: np.ndarray) -> np.ndarray:
    """Reference quantisation of a stacked kernel [layers, ...] in f64: steps of 1/127 of each output channel's maximum."""
    over = (1, 2) if path.endswith("/o/kernel") else (1,)
    exact = np.asarray(leaf, np.float64)
    step = np.abs(exact).max(axis=over, keepdims=True) / 127
    step = np.asarray(jnp.asarray(np.where(step > 0, step, 1), jnp.bfloat16), np.float64)
    return np.clip(np.rint(exact / step), -127, 127) * step


def stacked_matrix(path: str, leaf: np.ndarray) -> bool:
    return "blocks/" in path and (path.endswith("/kernel") or path.endswith("/lora/qkv/a"))


@pytest.mark.parametrize("name", SUBTREES)
def test_every_freezable_subtree_computes_in_int8(name: str) -> None:
    """Results are within 2% of bfloat16 with the same rounded weights, and within 10% of bfloat16 with exact weights."""
    model, axes, run = SUBTREES[name]()
    first = jax.jit(lambda key: model.init(key, method=run)["params"])(jax.random.key(0))
    rng = np.random.default_rng(0)  # random, as some parameters are initialised to zero
    exact = {k: jnp.asarray(v + rng.normal(0, 0.1, v.shape), jnp.bfloat16) for k, v in state.flatten(first).items()}
    by_hand = {k: jnp.asarray(rounded(k, v), jnp.bfloat16) if stacked_matrix(k, v) else v for k, v in exact.items()}
    held = quantize.hold(state.unflatten(exact), axes)
    eight = {path for path, leaf in state.flatten(held).items() if isinstance(leaf, quantize.Quantized)}
    assert eight == {path for path, leaf in exact.items() if stacked_matrix(path, leaf)} and eight
    apply = jax.jit(
        lambda params: jax.tree.map(lambda x: x.astype(jnp.float32), model.apply({"params": params}, method=run))
    )
    made, near, whole = (jax.tree.leaves(apply(p)) for p in (held, state.unflatten(by_hand), state.unflatten(exact)))
    for one, two, three in zip(made, near, whole, strict=True):
        assert np.linalg.norm(one - two) <= 0.02 * np.linalg.norm(two)
        assert 0 < np.linalg.norm(one - three) <= 0.1 * np.linalg.norm(three)


def frozen_runs(tmp_path: Path):
    np.savez(tmp_path / "entities.npz", entity_features=np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32))
    half = tiny.MODEL.clone(vision=TOWER)
    yield {"model": half}, "(llm|vision|abstractor)/.*"
    alpro = {
        "task": "alpro_pretrain",
        "options": {"entities": str(tmp_path / "entities.npz")},
        "model": ALPRO_MODEL,
    }
    for pattern in ("prompter/.*", "(prompter|vision|text|fusion|mlm)/.*"):
        yield alpro, pattern


def test_runs_with_other_frozen_subtrees(tmp_path: Path) -> None:
    """Compare the loss of a run with these subtrees in int8 with that of the same run in bfloat16."""
    for settings, pattern in frozen_runs(tmp_path):
        values = []
        for dtype in ("int8", "bfloat16"):
            given = dict(settings)
            experiment = tiny.experiment(given.pop("model"), train={"frozen_dtype": dtype, "frozen": (pattern,)})
            run = setup.prepare(dataclasses.replace(experiment, **given), jax.devices()[:1])
            params, _ = setup.fresh_params(run)
            trainable, frozen = state.split(params, run.frozen_patterns)
            rng = np.random.default_rng(0)
            batch = {
                key: rng.integers(0, 3, leaf.shape).astype(leaf.dtype)
                if leaf.dtype != bool else np.ones(leaf.shape, bool)
                for key, leaf in setup.abstract_batch(run).items()
            }  # fmt: skip
            held = setup.hold(run, frozen)
            assert any(isinstance(leaf, quantize.Quantized) for leaf in state.flatten(held).values()) == (
                dtype == "int8"
            )
            loss = jax.jit(run.task.loss)(state.merge(trainable, held), batch, None)[0]
            values.append(float(loss))
        np.testing.assert_allclose(values[0], values[1], rtol=0.05, err_msg=pattern)


def test_eight_devices_equal_one() -> None:
    found = []
    for devices, mesh in ((1, {}), (8, {"fsdp": 2, "tensor": 2})):
        run, now, frozen = ready(devices, **mesh)
        key = jax.device_put(jax.random.key(0), jax.sharding.NamedSharding(run.mesh, jax.sharding.PartitionSpec()))
        step = step_lib.compile_step(run)
        for seed in range(3):
            now, metrics = step(now, setup.hold(run, frozen), tiny.batch(run, seed), key)
        found.append(metrics["loss"].value())
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_plan_counts_bytes_and_parameters() -> None:
    eight, half = (tiny.prepare(1, train={"frozen_dtype": dtype}) for dtype in ("int8", "bfloat16"))
    one, two = estimate.estimate(eight), estimate.estimate(half)
    assert one["frozen_params"] == two["frozen_params"]
    assert one["checkpoint_bytes"] == two["checkpoint_bytes"]
    kernels = sum(
        leaf.size for path, leaf in state.flatten(half.frozen).items() if "blocks" in path and "kernel" in path
    )
    saved = two["bytes_per_device"]["frozen"] - one["bytes_per_device"]["frozen"]
    assert 0.9 * kernels < saved < kernels  # one byte saved per value, minus the scales
    assert "int8" in parameter_table.table(eight)
    assert aot.model_flops(eight) == aot.model_flops(half)


@pytest.mark.slow
def test_int8_run_resumes_and_is_evaluated(tmp_path: Path) -> None:
    """Checkpoints store bfloat16, and a resumed run gives bit-identical results."""
    data, folder = runs.make_data(tmp_path), tmp_path / "run"
    settings = ["--config.train.frozen_dtype=int8", "--config.data.eval_split=", "--config.train.duration=10 steps"]
    runs.run(folder, data, *settings)
    kernel = runs.saved(folder)["llm/blocks/mlp/up/kernel"]
    assert kernel.dtype == jnp.bfloat16 and len(np.unique(kernel)) > 256
    before = runs.losses(folder)
    shutil.rmtree(folder / "checkpoints" / "steps" / "10")
    runs.run(folder, data, *settings)
    assert (folder / "metrics.jsonl").read_text().count('"loss"') == 10 + 5  # five steps were repeated
    assert len(before) == 10 and runs.losses(folder) == before
    done = runs.run(folder, data, *settings[:1], "--config.data.eval_split=validation", "--mode=eval", "--examples=4")
    assert '"examples": 4' in done.stdout
