"""Orbax checkpoints of a run. Frozen parameters are saved once, the training state at intervals.

Names, shapes and checksums are verified on reading. Layout of the run's folder:
    checkpoints/frozen/                    frozen parameters, written once
    checkpoints/steps/<n>/trainable/       float32 parameters after n steps
    checkpoints/steps/<n>/opt_state/       optimizer state
    checkpoints/steps/<n>/carried/         state beside the parameters, of tasks that carry any
    checkpoints/steps/<n>/progress/        {"step": n, "examples_seen": ...}
    checkpoints/steps/<n>/checksums/       checksums of every leaf of these trees
A step appears under its name only when it is complete (Orbax renames a temporary folder); leftovers of a killed process are
ignored, and removed at the next start. Restoring reads into an abstract tree with shapes, dtypes and shardings, so a checkpoint
can be restored on any mesh and any number of hosts.
"""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ymplug_jax.core import leaf_checksums, sharding, verified_read
from ymplug_jax.core import state as state_lib
from ymplug_jax.core.checkpoint_files import (
    CARRIED,
    FROZEN,
    OPT_STATE,
    STEPS,
    TRAINABLE,
    damaged,
    fits,
    json_in,
    latest_step,
    place_of,
    say_unverified,
    sums_of,
    whole,
)
from ymplug_jax.core.exits import PlaceFailed
from ymplug_jax.core.verified_read import Damaged, stored_in

CHUNK = 32 * 2**20  # bytes of a chunk of a frozen leaf on the disk


class Checkpoints:
    """Saves and restores the checkpoints of one run. Saving is asynchronous; `close` waits for the last save.

    The disk does not change before the first save, so a run can still be rejected without leaving files behind.
    """

    def __init__(self, workdir: str, *, keep: int = 3, frozen_sums: dict[str, str] | None = None):
        """Open the folder.

        Args:
          workdir: the run's folder.
          keep: number of newest steps to keep.
          frozen_sums: checksums of frozen parameters stored in another folder. `save_frozen` computes its own.
        """
        self.workdir = whole(workdir)
        self.folder = self.workdir / "checkpoints"
        self._keep = keep
        self.frozen_sums = frozen_sums
        self._read_back = False  # whether the first save of this process was read back

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        return ocp.CheckpointManager(self.folder / STEPS, options=options)

    def latest_step(self) -> int | None:
        """Return the newest complete step, or None for a new run."""
        return latest_step(str(self.workdir))

    def save_frozen(self, frozen: state_lib.Params, abstract: state_lib.Params | None = None) -> None:
        """Write the frozen tree and read it back. Does nothing if the run has a step, since the tree is saved before it.

        Args:
          frozen: arrays on the devices or, where an int8 run will quantise them, in the host's memory.
          abstract: the same tree of ShapeDtypeStructs with shardings; None: all arrays are on the devices.

        Raises:
          PlaceFailed: the tree cannot be written or read back.
        """
        flat = state_lib.flatten(frozen)
        folder, step = self.folder / FROZEN, self.latest_step()
        if step is not None:
            # Checksums of the stored tree: frozen_dtype may differ in this process.
            self.frozen_sums = (sums_of(self.folder / STEPS / str(step)) or {}).get(FROZEN)
            return
        if not flat:
            return
        self.frozen_sums = leaf_checksums.of_tree(flat)
        with self._whole_or_not(), ocp.StandardCheckpointer() as writer:
            # A tree left by a run that never reached its first save belongs to no step and is overwritten.
            # Small chunks, so that a part of a leaf can be read without the rest.
            how = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK), frozen)
            writer.save(folder, frozen, save_args=how, force=True)
            writer.wait_until_finished()
        _must_read(folder, frozen if abstract is None else abstract, self.frozen_sums)

    def save(self, state: state_lib.TrainState, step: int, examples_seen: int) -> None:
        """Start saving the state after `step` steps; an existing step is not saved again.

        The first save is synchronous and read back, so that unreadable storage is detected early in the run.

        Raises:
          PlaceFailed: this save or the previous one failed.
        """
        if step in self._manager.all_steps():  # includes steps still being saved
            return
        trees = _trees(state)
        sums = {name: leaf_checksums.of_tree(verified_read.named(tree)) for name, tree in trees.items()}
        stored = sums | ({} if self.frozen_sums is None else {FROZEN: self.frozen_sums})
        with self._whole_or_not():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
                    progress=ocp.args.JsonSave({"step": step, "examples_seen": examples_seen}),
                    checksums=ocp.args.JsonSave(stored),
                ),
            )
        if not self._read_back:
            self.wait()
            folder = self.folder / STEPS / str(step)
            for name, tree in trees.items():
                _must_read(folder / name, tree, sums[name])
            self._read_back = True

    def keep_only(self, steps: Iterable[int]) -> None:
        """Delete all other complete steps. Call it on all processes, after `wait`."""
        with self._whole_or_not():
            others = sorted(set(self._manager.all_steps()) - set(steps))
            if jax.process_count() > 1:  # each process waits for each deletion, so all must have the same list
                multihost_utils.sync_global_devices("steps are listed")
            for step in others:
                self._manager.delete(step)

    def keep_newest(self) -> None:
        """Delete the steps that a run would have deleted if it had not been killed after its last save. Call it on all processes."""
        self.keep_only(sorted(self._manager.all_steps())[-self._keep :])

    def restore(self, abstract: state_lib.TrainState, step: int) -> tuple[state_lib.TrainState, int]:
        """Restore (state, examples_seen) of a step with the shardings of `abstract`.

        Raises:
          CheckpointError: parameter names or shapes differ from `abstract`, or the step is damaged.
        """

        def read(step: int) -> tuple[dict[str, Any], dict]:
            folder = self.folder / STEPS / str(step)
            stored, sums = stored_in(folder / TRAINABLE), sums_of(folder) or {}
            fits(stored, state_lib.flatten(abstract.trainable), folder / TRAINABLE)
            beside = stored_in(folder / CARRIED) if CARRIED in sums or (folder / CARRIED).exists() else {}
            fits(beside, state_lib.flatten(abstract.carried), folder / CARRIED)
            progress = json_in(folder / "progress", "its progress")
            if not isinstance(progress.get("step"), int) or not isinstance(progress.get("examples_seen"), int):
                raise Damaged("its progress", "no step and examples_seen in it")
            trees = _trees(abstract).items()
            return {name: verified_read.read(folder / name, tree, sums.get(name)) for name, tree in trees}, progress

        try:
            trees, progress = read(step)
        except Damaged as error:
            raise damaged(self.workdir, step, error, read) from None
        if sums_of(self.folder / STEPS / str(step)) is None:
            say_unverified(self.folder / STEPS / str(step))
        state = state_lib.TrainState(
            step=sharding.on_all_hosts(lambda: jax.numpy.int32(progress["step"]), abstract.step.sharding),
            trainable=trees[TRAINABLE],
            opt_state=trees[OPT_STATE]["state"],
            carried=trees.get(CARRIED, {}),
        )
        return state, progress["examples_seen"]

    def wait(self) -> None:
        """Wait until all started saves are complete on disk.

        Raises:
          PlaceFailed: a save failed.
        """
        if "_manager" in self.__dict__:
            with self._whole_or_not():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for pending saves and stop the threads."""
        if "_manager" not in self.__dict__:
            return
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # repeats the error of `wait`
                self._manager.close()

    @contextlib.contextmanager
    def _whole_or_not(self) -> Iterator[None]:
        """Convert errors of a save to PlaceFailed and remove partial files."""
        try:
            with place_of(self.folder):
                yield
        except PlaceFailed:
            if jax.process_index() == 0:
                for folder in (self.folder, self.folder / STEPS):
                    with contextlib.suppress(OSError):
                        for partial in folder.glob("*.orbax-checkpoint-tmp*"):
                            partial.rmtree()
            raise


def _trees(state: state_lib.TrainState) -> dict[str, Any]:
    """Item of a step -> its tree; a state that carries nothing has no item for it."""
    trees = {TRAINABLE: state.trainable, OPT_STATE: {"state": state.opt_state}}
    return trees | ({CARRIED: state.carried} if state.carried else {})


def _must_read(folder: epath.Path, tree: Any, sums: Mapping[str, str]) -> None:
    """Read back a saved tree, of arrays or ShapeDtypeStructs, in parts and compare its checksums.

    Raises:
      PlaceFailed: the tree cannot be read, or differs from what was saved.
    """
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree)
    try:
        for _ in verified_read.groups(folder, abstract, sums):
            pass
    except Damaged as error:
        raise PlaceFailed(
            f"{folder}: saved, but cannot be read back ({error}); check the disk, or choose another --workdir"
        ) from None
