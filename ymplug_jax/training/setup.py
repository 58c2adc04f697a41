"""Prepare a run: task, device mesh, optimizer, and the sharding and origin of every parameter. Shared by all programs."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from ymplug_jax.core import config, durations, optim, quantize, sharding, stored_params
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.state import Params, TrainState
from ymplug_jax.data.source import open_split
from ymplug_jax.models import kernels, layers, lora
from ymplug_jax.tasks import task as task_lib
from ymplug_jax.tasks.task import Task
from ymplug_jax.training import carried, device_augment, mixing

if TYPE_CHECKING:
    from ymplug_jax.core import checkpoint

DTYPES = ("float32", "bfloat16", "float16", "int8")  # values of config.train.frozen_dtype


@dataclasses.dataclass(frozen=True)
class Run:
    """A prepared run. It takes no device memory: all trees are abstract (shape, dtype, sharding)."""

    experiment: Experiment
    task: Task
    mesh: Mesh
    frozen_patterns: tuple[str, ...]
    tx: optax.GradientTransformation
    rate: Callable[[jax.Array], jax.Array]
    examples: int  # number of examples of an epoch: the training split, or one pass over a packed mixture
    steps_per_epoch: int
    total_steps: int
    state: TrainState  # abstract
    frozen: Params  # abstract frozen parameters as stored in checkpoints
    held: Params  # abstract frozen parameters as held on the devices; differs from `frozen` for int8
    kernels_off: frozenset[str] = frozenset()  # fused kernels replaced by plain XLA
    mixture: mixing.Plan | None = None  # None: one folder without packing

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Apply the run's mesh, mesh rules, enabled kernels and unrolling; trace all programs of the run inside."""
        experiment = self.experiment
        with (
            sharding.computing(self.mesh, experiment.mesh.rules),
            kernels.without(self.kernels_off),
            layers.unrolled(experiment.train.unroll),
        ):
            yield


def seeds(experiment: Experiment, workdir: epath.Path, count: int) -> list[tuple[Experiment, epath.Path]]:
    """Return (settings, folder) of `count` runs that differ only in their seed; a single run uses `workdir` itself.

    Raises:
      ValueError: `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"--seeds {count}: too small; give 1 or more")
    if count == 1:
        return [(experiment, workdir)]
    first = experiment.train.seed
    return [
        (
            dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, seed=seed)),
            workdir / f"seed_{seed}",
        )
        for seed in range(first, first + count)
    ]


def prepare(
    experiment: Experiment,
    devices: Sequence[jax.Device] | None = None,
    *,
    training: bool = True,
    workdir: epath.Path | None = None,
) -> Run:
    """Check the settings for consistency and return the abstract run.

    Args:
      experiment: resolved settings.
      devices: devices of the mesh; None: all devices.
      training: False for an evaluation, which does not read the training split; `examples` and all step counts are then 0.
      workdir: folder of the run, whose stored sizes of the records save measuring them again.

    Raises:
      ValueError: settings contradict each other; the message names the one to change.
    """
    train = experiment.train
    if train.frozen_dtype not in DTYPES:
        raise Mistake(
            f"config.train.frozen_dtype: unknown dtype {train.frozen_dtype!r}; choose one of {', '.join(DTYPES)}"
        )
    task = task_lib.get(experiment)
    axes = experiment.mesh
    _check_rules(dict(axes.rules), task)
    mesh = sharding.make_mesh(axes.data, axes.fsdp, axes.tensor, devices)
    sharding.local_rows(train.batch_size, mesh)  # raises if the batch cannot be sharded
    if train.batch_size % (train.accumulate * mesh.shape["data"] * mesh.shape["fsdp"]):
        raise ValueError(
            f"config.train.batch_size: {train.batch_size} is not a multiple of config.train.accumulate x mesh data x fsdp = "
            f"{train.accumulate} x {mesh.shape['data']} x {mesh.shape['fsdp']}; change one of them"
        )
    mixture = _mixture(experiment, task, workdir) if training else None
    examples, per_epoch, total, warmup = _steps(experiment, mixture) if training else (0, 0, 0, 0)

    patterns = task.frozen if train.frozen is None else train.frozen
    # Create the key inside eval_shape as well, so that nothing is compiled here.
    params = jax.eval_shape(lambda: task.init(jax.random.key(0)))
    params = state_lib.cast_frozen(params, patterns, _stored(train))
    for line in sharding.uncut(params, task.axes, dict(axes.rules), mesh) if jax.process_index() == 0 else ():
        logging.warning("%s", line)
    params = _placed(params, sharding.param_shardings(params, task.axes, dict(axes.rules), mesh))
    trainable, frozen = state_lib.split(params, patterns)
    tx = optim.make(experiment.optim, trainable)
    whole = sharding.replicated(mesh)
    opt_state = optax.tree.map_params(
        tx,
        lambda leaf, param: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=param.sharding),
        jax.eval_shape(tx.init, trainable),
        trainable,
        transform_non_params=lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    )
    beside = carried.abstract(experiment, task, params, mesh)
    state = TrainState(state_lib.stand_in((), "int32", whole), trainable, opt_state, beside)
    rate = optim.schedule(experiment.optim, warmup=warmup, total=total)
    held = quantize.abstract(frozen, task.axes) if train.frozen_dtype == "int8" else frozen
    off = frozenset() if train.fused_kernels else frozenset(kernels.KERNELS)
    return Run(
        experiment, task, mesh, patterns, tx, rate, examples, per_epoch, total, state, frozen, held, off, mixture
    )


def _mixture(experiment: Experiment, task: Task, workdir: epath.Path | None) -> mixing.Plan | None:
    if not experiment.data.path:
        return None
    records = open_split(experiment.data.path, experiment.data.train_split)
    return mixing.plan(experiment, task, records, workdir)


def _check_rules(rules: Mapping[str, str], task: Task) -> None:
    """Check that each mesh rule maps an axis name of the model, or of the default rules, to a mesh axis."""
    axes = (*task.axes, *(task.carried.axes if task.carried else ()))
    words = {word for _, named in axes for word in named.split()} | dict(config.Mesh().rules).keys()
    for word, axis in rules.items():
        if word not in words:
            raise Mistake(
                f"config.mesh.rules: unknown parameter axis {word!r}; choose one of {', '.join(sorted(words))}"
            )
        if axis not in sharding.MESH_AXES:
            raise Mistake(
                f"config.mesh.rules: unknown mesh axis {axis!r}; choose one of {', '.join(sharding.MESH_AXES)}"
            )


def _steps(experiment: Experiment, mixture: mixing.Plan | None) -> tuple[int, int, int, int]:
    """Return (training examples, steps per epoch, total steps, warm-up steps).

    Parses every duration of the settings, so that a wrong one fails before the step is compiled.

    Raises:
      ValueError: a duration or interval is invalid, or the training split is smaller than a batch.
    """
    train = experiment.train
    if mixture is not None:
        examples = mixture.examples
    elif experiment.data.path:
        examples = len(open_split(experiment.data.path, experiment.data.train_split))
    elif not (examples := experiment.data.examples):
        raise Mistake(
            "config.data.path: empty; give the folder of the shards, or set config.data.examples to plan without data"
        )
    if (per_epoch := examples // train.batch_size) == 0:
        raise Mistake(
            f"config.train.batch_size: {train.batch_size} is larger than the training split; give at most {examples}"
        )
    if "%" in train.duration:
        raise Mistake(
            f'config.train.duration: {train.duration!r} is relative to itself; write "2000 steps" or "10 epochs"'
        )
    total = durations.steps_in(train.duration, steps_per_epoch=per_epoch, setting="config.train.duration")
    if not total:
        raise Mistake(
            f"config.train.duration: {train.duration!r} is less than one step of this data; train for 1 step or more"
        )
    for name in ("log_every", "save_every", "eval_every", "eval_scores_every"):
        value, setting = getattr(train, name), f"config.train.{name}"
        if name == "eval_scores_every" and not value:
            continue
        durations.steps_in(value, steps_per_epoch=per_epoch, total=total, setting=setting)
        if durations.is_zero(value):  # a positive interval below one step means every step
            raise Mistake(f"{setting}: {value!r} is not an interval; write 1 step or more")
    warmup = durations.steps_in(
        experiment.optim.warmup, steps_per_epoch=per_epoch, total=total, setting="config.optim.warmup"
    )
    return examples, per_epoch, total, warmup


def _stored(train: config.Train) -> str:
    return quantize.STORED if train.frozen_dtype == "int8" else train.frozen_dtype


def hold(run: Run, frozen: Params) -> Params:
    """Convert frozen parameters from their stored form to the form used on the devices; those that have it stay as they are.

    Only `frozen_dtype="int8"` changes them: see `docs/models/language_models.md`, section Frozen matrices in eight bits. Matrices in
    the host's memory, where `fresh_params` puts them, reach the devices in slices.
    """
    if run.experiment.train.frozen_dtype != "int8":
        return frozen
    from ymplug_jax.core import quantized_read  # imported here, because benchmarks run without Orbax

    held = state_lib.flatten(run.held)
    made = {
        path: quantized_read.from_host(leaf, held[path]) if isinstance(leaf, np.ndarray) else leaf
        for path, leaf in state_lib.flatten(frozen).items()
    }
    return quantize.hold(state_lib.unflatten(made), run.task.axes)


def _placed(tree: Params, shardings: Params) -> Params:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, shardings
    )


def abstract_batch(run: Run, more: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes, dtypes and sharding of a global batch as the loader yields it.

    Args:
      run: the prepared run.
      more: arrays of an example beside those of `Task.spec`.
    """
    place = sharding.batch_sharding(run.mesh)
    size = run.experiment.train.batch_size
    spec = {
        key: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype, sharding=place)
        for key, leaf in (*run.task.spec.items(), *(more or {}).items())
    }
    return spec | {"valid": jax.ShapeDtypeStruct((size,), "bool", sharding=place)}


def training_batch(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes, dtypes and sharding of a global batch of training: with `config.data.window` as the step reads it.

    Raises:
      Mistake: `config.data.window` does not fit the task or the settings.
    """
    return abstract_batch(run, device_augment.window_spec(run.experiment.data, run.task.spec))


def initialise(run: Run, checkpoints: "checkpoint.Checkpoints") -> tuple[TrainState, Params, int, dict[str, str]]:
    """Return (state, frozen parameters, examples seen, origin of each parameter path).

    The state comes from the run's newest checkpoint, if there is one, and the frozen parameters are in the form used on the devices.
    Else both come from `fresh_state`, in their stored form; pass them to `hold`.
    """

    step = checkpoints.latest_step()
    if step is not None:
        state, seen = checkpoints.restore(run.state, step)
        frozen = stored_params.load_params(str(checkpoints.folder.parent), run.held) if run.frozen else {}
        flat = state_lib.flatten(state_lib.merge(run.state.trainable, run.frozen))
        return state, state_lib.unflatten(frozen), seen, dict.fromkeys(flat, f"this run, step {step}")
    fresh, frozen, origin = fresh_state(run)
    return fresh, frozen, 0, origin


def fresh_state(run: Run) -> tuple[TrainState, Params, dict[str, str]]:
    """Return (state at step 0, stored frozen parameters, origin of each parameter path); see `fresh_params`."""
    params, origin = fresh_params(run)
    trainable, frozen = state_lib.split(params, run.frozen_patterns)
    places = jax.tree.map(lambda leaf: leaf.sharding, run.state.opt_state)
    opt_state = jax.jit(run.tx.init, out_shardings=places)(trainable)
    step = sharding.on_all_hosts(lambda: jax.numpy.int32(0), run.state.step.sharding)
    beside = carried.fresh(run.task, params, run.state.carried, run.experiment.train.seed)
    return TrainState(step, trainable, opt_state, beside), frozen, origin


def fresh_params(run: Run) -> tuple[Params, dict[str, str]]:
    """Return (parameters, origin of each path): loaded from `config.train.init_from`, else initialised from the seed.

    Loaded matrices that `hold` quantises are NumPy arrays: no device holds them in another form than int8.
    """
    train = run.experiment.train
    abstract = state_lib.merge(run.state.trainable, run.frozen)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    loaded, origin = init_from(run)
    flat = state_lib.flatten(abstract)
    missing = [path for path in flat if path not in loaded]
    fresh = state_lib.init_params(
        run.task.init, jax.random.key(train.seed), run.frozen_patterns, _stored(train), places, missing
    )
    origin |= dict.fromkeys(missing, "fresh")
    return state_lib.unflatten(loaded | state_lib.flatten(fresh)), {path: origin[path] for path in flat}


def _through_host(run: Run) -> Params:
    """The abstract frozen parameters, without a sharding where a matrix waits in the host's memory until it is quantised."""
    held = state_lib.flatten(run.held)
    return state_lib.unflatten(
        {
            path: state_lib.stand_in(leaf.shape, leaf.dtype) if isinstance(held[path], quantize.Quantized) else leaf
            for path, leaf in state_lib.flatten(run.frozen).items()
        }
    )


def init_from(run: Run, *, values: bool = True) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """Return (parameters by path, folder name by path) loaded from `config.train.init_from`.

    Args:
      run: the prepared run.
      values: False only compares names and shapes; no value is read and the results are empty.

    Raises:
      CheckpointError: a folder has no checkpoint, or its parameters do not fit the model.
    """
    from ymplug_jax.core import checkpoint_files

    abstract = state_lib.merge(run.state.trainable, _through_host(run))
    loaded: dict[str, jax.Array] = {}
    origin: dict[str, str] = {}
    for subtree, stored_as, folder in checkpoint_files.sources(run.experiment.train.init_from):
        part = stored_params.load_params(
            folder,
            abstract,
            subtree=subtree,
            stored_as=stored_as,
            # Weights without adapters are what adapters start from.
            allow_missing=(*run.task.fresh, lora.PARAMETERS),
            resize=run.task.resize,
            values=values,
        )
        loaded |= part
        origin |= dict.fromkeys(part, checkpoint_files.folder_of(folder).name)
    return loaded, origin
