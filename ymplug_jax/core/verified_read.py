"""Reading of checkpoint item folders, with every leaf verified against its checksum."""

import functools
import gc
import logging
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict

from ymplug_jax.core import exits, leaf_checksums, leaf_store
from ymplug_jax.core.exits import PlaceFailed

GROUP = 2**30  # bytes read at a time, in the stored dtype
# Errors of unreachable storage. Any other read error means that the checkpoint is damaged.
UNREACHABLE = re.compile(
    r"PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|Permission denied|Input/output error|Too many open files"
)


class Damaged(ValueError):
    """A leaf, or the metadata of a folder, cannot be read or differs from what was saved."""

    def __init__(self, what: str, reason: str):
        super().__init__(f"{what}: {reason}")
        self.what, self.reason = what, reason


def named(tree: Any) -> dict[str, Any]:
    """Return {path such as "1/mu/llm/ln/scale": leaf} of any tree, in tree order."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in _with_path(tree)}


def stored_in(folder: epath.Path) -> dict[str, Any]:
    """Return {path: Orbax metadata (shape, dtype)} of the parameters in an item folder.

    Raises:
      Damaged: the metadata cannot be read.
      PlaceFailed: the folder cannot be reached.
    """
    what = f"the list of parameters in {folder}"
    call(lambda: leaf_store.check_manifest(folder), folder, what)
    with ocp.PyTreeCheckpointer() as reader:
        found = call(lambda: reader.metadata(folder).item_metadata, folder, what)
    if found is None:
        raise Damaged(what, "cannot be read (_METADATA or manifest.ocdbt is missing or damaged)")
    return {"/".join(map(str, path)): leaf for path, leaf in _nested(found.tree).items()}


def read(folder: epath.Path, tree: Any, sums: Mapping[str, str] | None, dtypes: Mapping[str, Any] | None = None) -> Any:
    """Read a tree from an item folder and verify every leaf.

    Args:
      folder: folder of one Orbax item.
      tree: ShapeDtypeStructs with shardings of the leaves to read. A tree of dicts may omit leaves that the folder has.
      sums: checksum by path. None: do not verify, for checkpoints of older versions.
      dtypes: stored dtype by path, where it may differ from the wanted one. Leaves are cast after verification.

    Returns:
      The tree of arrays, with the dtypes and shardings of `tree`.

    Raises:
      Damaged: a leaf cannot be read, or differs from what was saved.
      PlaceFailed: the folder cannot be reached.
    """
    parts: dict[str, jax.Array] = {}
    for group in groups(folder, tree, sums, dtypes):
        parts |= group
    flat = named(tree)
    return jax.tree.unflatten(jax.tree.structure(tree), [parts[path] for path in flat])


def groups(
    folder: epath.Path, tree: Any, sums: Mapping[str, str] | None, dtypes: Mapping[str, Any] | None = None
) -> Iterator[dict[str, jax.Array]]:
    """Yield the leaves of `read` as {path: leaf} in groups of about GROUP bytes, to bound the additional memory."""
    wanted = named(tree)
    stored = {
        path: jax.ShapeDtypeStruct(leaf.shape, (dtypes or {}).get(path, leaf.dtype), sharding=leaf.sharding)
        for path, leaf in wanted.items()
    }
    for paths in _parted(stored):
        found = _restore(folder, tree, {path: stored[path] for path in paths})
        _verify(found, sums)
        yield {path: _cast(leaf, wanted[path]) for path, leaf in found.items()}


def _parted(leaves: Mapping[str, Any]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for path, leaf in leaves.items():
        part.append(path)
        size += int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        if size >= GROUP:
            yield part
            part, size = [], 0
    if part:
        yield part


def _restore(folder: epath.Path, tree: Any, chosen: Mapping[str, Any]) -> dict[str, jax.Array]:
    def once(chosen: Mapping[str, Any]) -> dict[str, jax.Array]:
        # With partial_restore, Orbax skips leaves that `item` lacks but reads placeholders. So for trees of dicts (parameters)
        # `item` holds only the chosen leaves; any other tree keeps its saved structure, with placeholders and no partial_restore.
        dicts = _of_dicts(tree)
        if dicts:
            item = unflatten_dict(dict(chosen), sep="/")
        else:
            leaves = [chosen.get(path, ocp.PLACEHOLDER) for path in named(tree)]
            item = jax.tree.unflatten(jax.tree.structure(tree), leaves)
        how = jax.tree.map(
            lambda leaf: (
                ocp.RestoreArgs() if leaf is ocp.PLACEHOLDER else ocp.checkpoint_utils.construct_restore_args(leaf)
            ),
            item,
        )
        with ocp.PyTreeCheckpointer() as reader:
            args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=dicts)
            found = named(reader.restore(folder, args=args))
        return {path: found[path] for path in chosen}

    try:
        return call(lambda: once(chosen), folder, "")
    except Damaged as error:
        if jax.process_count() > 1:  # other processes may have succeeded, so no further collective calls
            guess = [path for path in chosen if path.replace("/", ".") in error.reason]
            raise Damaged(
                max(guess, key=len, default=f"one of {', '.join(list(chosen)[:3])}, ..."), _short(error)
            ) from None
        for path, leaf in chosen.items():  # find the damaged leaf
            call(functools.partial(once, {path: leaf}), folder, path)
        raise Damaged("its parameters", _short(error)) from None  # every leaf alone could be read


def _of_dicts(tree: Any) -> bool:
    """Return whether the tree consists of dicts only."""
    return all(isinstance(key, jax.tree_util.DictKey) for path, _ in _with_path(tree) for key in path)


def call(function: Callable[[], Any], folder: epath.Path, what: str) -> Any:
    """Call `function`, converting the many error types that Orbax and TensorStore raise on damaged files."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)  # Orbax and TensorStore also log hundreds of lines
    try:
        return function()
    except (Damaged, PlaceFailed, jax.errors.JaxRuntimeError, MemoryError):
        raise  # found before; or the device is out of memory, or another process has exited
    except Exception as error:
        _forget_other_reads()
        if hidden := exits.place_failed(error):
            raise PlaceFailed(str(hidden)) from None
        text = f"{type(error).__name__}: {error}"
        if UNREACHABLE.search(text):
            raise PlaceFailed(
                f"{folder}: cannot be read ({_short(error)}); check the connection and the permissions"
            ) from None
        if what:
            raise Damaged(what, f"cannot be read ({_short(error)})") from None
        raise Damaged(what, text) from None
    finally:
        logging.disable(level)


def _forget_other_reads() -> None:
    """Silence errors of concurrent reads that Orbax abandoned when one read failed and it closed their event loop.

    They would print hundreds of lines when they end, when they are garbage-collected, and at interpreter exit.
    """
    for name in ("unraisablehook", "excepthook"):
        hook = getattr(sys, name)
        if not isinstance(hook, functools.partial):
            setattr(sys, name, functools.partial(_tell_others, hook))
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    gc.collect()


def _tell_others(
    hook: Callable[..., Any], *given: Any, coroutines: "type[types.CoroutineType[Any, Any, Any]]" = types.CoroutineType
) -> None:
    """Forward errors to the original `sys` hook, except those of abandoned Orbax reads.

    Everything it needs is passed as an argument, because module globals may be gone at interpreter exit.
    """
    error = given[1] if len(given) > 1 else given[0].exc_value
    found: Any = None if len(given) > 1 else given[0].object
    late = str(error) == "Event loop is closed"
    if not late and not (isinstance(found, coroutines) and "orbax" in found.cr_code.co_filename):
        hook(*given)


def _short(error: Exception) -> str:
    """Summarise an error in a few words, based on TensorStore's status code if there is one."""
    text = error.reason if isinstance(error, Damaged) else f"{type(error).__name__}: {error}"
    if found := re.search(r"\b(NOT_FOUND|DATA_LOSS|OUT_OF_RANGE|FAILED_PRECONDITION|INVALID_ARGUMENT)\b", text):
        return {"NOT_FOUND": "a file is missing", "OUT_OF_RANGE": "a file is too short"}.get(
            found[1], "a file is damaged"
        )
    if "reading array index" in text:  # Orbax's message without TensorStore's details
        return "a part of it is missing or damaged"
    return text.splitlines()[0][:100]


def _verify(found: Mapping[str, jax.Array], sums: Mapping[str, str] | None) -> None:
    if sums is None:
        return
    seen = leaf_checksums.of_tree(found)
    for path, now in seen.items():
        if path not in sums:
            raise Damaged(path, "no checksum stored in its checkpoint")
        if now != sums[path]:
            raise Damaged(path, f"differs from what was saved (checksum {now}, saved {sums[path]})")


def _cast(leaf: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    return leaf if leaf.dtype == wanted.dtype else jax.device_put(_as_type(leaf, wanted.dtype), wanted.sharding)


@functools.partial(jax.jit, static_argnums=1)
def _as_type(leaf: jax.Array, dtype: Any) -> jax.Array:
    return leaf.astype(dtype)


def _with_path(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda leaf: leaf is ocp.PLACEHOLDER)[0]


def _nested(tree: Any, prefix: tuple = ()) -> dict[tuple, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {path: leaf for key, value in tree.items() for path, leaf in _nested(value, (*prefix, key)).items()}
