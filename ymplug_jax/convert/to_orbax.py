"""Converts PyTorch checkpoints to Orbax, one tensor at a time."""

import contextlib
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
from flax.traverse_util import flatten_dict

import ymplug_jax
from ymplug_jax.convert import hub_config, lock, lora, rules, tokenizer_copy
from ymplug_jax.convert.plan import MODELS, Layout, Plan, UnknownModel, extra, map_of
from ymplug_jax.convert.source_files import SourceError
from ymplug_jax.convert.store import Store
from ymplug_jax.convert.torch_file import Source
from ymplug_jax.core import exits, progress
from ymplug_jax.core.config import settings_of


class Wish(NamedTuple):
    """Options of a conversion."""

    heads: Mapping[str, int] = {}  # "llm", "vision", "text" or "abstractor" -> attention heads
    dtype: Mapping[str, str] = {}  # subtree or "frozen" -> dtype
    image_size: int | None = None  # pixels to resize the positional embeddings for; None: keep them
    frames: int | None = None  # frames to resize the temporal embeddings for; None: keep them
    adapter: Path | None = None  # folder that PEFT wrote
    keep_adapter: bool = False  # store the adapter separately instead of merging it
    allow_missing: Sequence[str] = ()  # regexes of tensor names, full match
    allow_unexpected: Sequence[str] = ()


class Opened(NamedTuple):
    """An opened source and the model that was recognised in it."""

    source: Source
    adapter: lora.Adapter | None
    plan: Plan
    layout: Layout
    entries: dict[str, rules.Entry]  # source tensor -> where it goes
    config: hub_config.HubConfig | None  # config.json in the folder of the weights


def open_source(model: str, files: list[Path], wish: Wish) -> Opened:
    """Read the names and shapes of a source, and recognise its sizes and layout.

    Raises:
      SourceError: the files cannot be used.
      UnknownModel: the files hold another model; the message names a likely one.
    """
    module = map_of(model)
    rename = extra(module, "RENAME", ())
    source = Source(files, extra(module, "MERGE"), rename, extra(module, "COPIES", ()))
    source.check_pieces()
    adapter = lora.read(wish.adapter, rename) if wish.adapter else None
    if adapter and wish.keep_adapter:
        source.join(adapter.source)
    elif adapter:
        lora.merge(source, adapter)
    elif found := next((name for name in source.shapes() if ".lora_" in name), None):
        raise SourceError(
            f"{files[0]}: holds the adapter {found} without its scale, which adapter_config.json states; give weights without "
            "adapters as --source, and the adapter's folder as --lora"
        )
    try:
        config = hub_config.beside(source.files, module.MODEL_TYPES) if hasattr(module, "MODEL_TYPES") else None
        plan = _planned(module, source, wish.heads, config)
    except UnknownModel as error:
        likely = [other for other in MODELS if other != model and _fits(other, files)]
        raise UnknownModel(f"{files[0]}: {error}" + (f"; try --model {likely[0]}" if likely else "")) from None
    if adapter and wish.keep_adapter and not isinstance(plan.model, tuple):
        plan = plan._replace(model=lora.scaled(plan.model, adapter.scale))
    layout: Layout = module.LAYOUTS[plan.layout]
    return Opened(source, adapter, plan, layout, rules.expand(layout.rules, plan.like), config)


def _planned(module: ModuleType, source: Source, heads: Mapping[str, int], config: hub_config.HubConfig | None) -> Plan:
    more = (config,) if hasattr(module, "MODEL_TYPES") else ()
    return module.plan(source.shapes(), heads, *more)


def _fits(model: str, files: list[Path]) -> bool:
    module = map_of(model)
    try:
        source = Source(files, extra(module, "MERGE"), extra(module, "RENAME", ()), extra(module, "COPIES", ()))
        config = hub_config.beside(source.files, module.MODEL_TYPES) if hasattr(module, "MODEL_TYPES") else None
        shapes, heads = source.shapes(), {} if config else dict.fromkeys(("llm", "vision", "text", "abstractor"), 1)
        plan = _planned(module, source, heads, config)
        return len(rules.expand(module.LAYOUTS[plan.layout].rules, plan.like).keys() & shapes.keys()) > len(shapes) // 4
    except (SourceError, UnknownModel, ValueError):
        return False


def to_orbax(model: str, files: list[Path], out: Path, wish: Wish) -> Path:
    """Convert one model, tensor by tensor, and record the conversion in `out`/conversion.json.

    Args:
      model: one of `plan.MODELS`.
      files: files of the source, or one folder that holds them.
      out: folder for the conversion; it is locked meanwhile, see `lock`.
      wish: options.

    Returns:
      The folder of the checkpoint.

    Raises:
      SourceError: the files cannot be used, or tensors are missing, unexpected or of another shape.
      UnknownModel: the files hold another model.
      exits.Mistake: another conversion writes into `out`, a checkpoint exists, or `out` cannot be written or has too little space.
      exits.PlaceFailed: a disk fails during the conversion; the same call resumes it.
    """
    opened = open_source(model, files, wish)
    table = compared(opened, wish)
    print(*opened.source.notes, table.text, sep="\n", file=sys.stderr)
    if table.bad:
        pattern, hint = extra(map_of(model), "LACKS", ("", ""))
        if table.missing and all(re.fullmatch(pattern, name) for name in table.missing):
            raise SourceError(f"{files[0]}: lacks {_some(table.missing, 2)}: {hint}")
        raise SourceError(
            f"{files[0]}: does not fit model {model}: {table.bad}; give the right model, or allow the difference with "
            "--allow_missing or --allow_unexpected"
        )
    for copy, original in table.tied:
        if not np.array_equal(_bits(opened.source.read(copy)), _bits(opened.source.read(original))):
            raise SourceError(
                f"{files[0]}: {copy} and {original} are tied in model {model} but differ here; give the files of that model"
            )
    resized = dict(_resized(map_of(model), opened.plan, wish))
    with lock.held(out):
        return _written(model, opened, table, resized, out, wish)


def _written(model: str, opened: Opened, table: "Table", resized: "Resized", out: Path, wish: Wish) -> Path:
    """Write the checkpoint, or the rest of an interrupted one; returns its folder."""
    source, entries = opened.source, opened.entries
    whole = {path: tuple(leaf.shape) for path, leaf in flatten_dict(opened.plan.like, sep="/").items()}
    whole |= {path: shape for path, (shape, _) in resized.items()}
    casts = _casts(map_of(model), whole, wish.dtype)
    identity = {
        "model": model,
        "converter": ymplug_jax.__version__,
        "files": source.identity(),
        "asked": {name: str(value) for name, value in wish._asdict().items()},
    }
    store = Store(out, identity, sum(_size(source, name, entries[name], whole, casts) for name in table.taken))
    total = sum(_bytes(source, name) for name in table.taken)
    written: set[str] = set()
    bar: progress.Bar[None] = progress.bar(total=total, unit="B", scale=True, desc="convert")
    ended = threading.Event()
    with _closed_on_error(store), ThreadPoolExecutor(1) as beside, _set_on_error(ended), bar:
        digests = beside.submit(_digests, opened, ended)
        for name in table.taken:
            if name not in store.done:
                for path, layer, value in rules.pieces(entries[name], source.read(name)):
                    if path in resized:
                        value = np.asarray(resized[path][1](jnp.asarray(value), whole[path])).astype(value.dtype)
                    value = _dense(value).astype(casts.get(path, value.dtype), copy=False)
                    store.write(path, layer, value, whole[path])
                store.wrote(name)
            written.update(path for path in entries[name].rule.targets if path)
            bar.update(_bytes(source, name))
        facts = {
            "model": model,
            "layout": opened.plan.layout,
            "converter": ymplug_jax.__version__,
            "sources": digests.result(),
            "heads": dict(wish.heads),
            "sizes": _sizes(opened.plan),
            "tied": table.tied,
            "dropped": table.dropped,
            "left_out": table.unexpected,
            "missing": table.missing,
            "resized": {path: list(shape) for path, (shape, _) in resized.items()},
            "dtype": dict(wish.dtype),
            "adapter": opened.adapter.config | {"kept": wish.keep_adapter} if opened.adapter else None,
            "config": dict(opened.config.values) if opened.config else None,
            "chat": extra(map_of(model), "CHAT", None),
        }
        if facts["chat"]:
            print(tokenizer_copy.keep(source.files, out), file=sys.stderr)
    return store.finish(sorted(written), facts)


@contextlib.contextmanager
def _closed_on_error(store: Store) -> Iterator[None]:
    """Remove the partial checkpoint if the source is invalid; after any other error keep it, so that a later call resumes."""
    try:
        yield
    except exits.Mistake:
        store.discard()
        raise
    except BaseException:
        store.stop()
        raise


@contextlib.contextmanager
def _set_on_error(event: threading.Event) -> Iterator[None]:
    """Set `event` when an error ends the block, Ctrl-C included."""
    try:
        yield
    except BaseException:
        event.set()
        raise


class Table(NamedTuple):
    """The tensors of a source, compared with those of the model."""

    taken: list[str]
    tied: list[tuple[str, str]]
    dropped: list[str]
    missing: list[str]
    unexpected: list[str]
    bad: str  # differences that are not allowed, as text; "" if there are none
    text: str  # the table that is printed


def compared(opened: Opened, wish: Wish) -> Table:
    """Sort the tensors of source and model into matched, tied, dropped, missing, unexpected and of another shape."""
    shapes, entries, layout = opened.source.shapes(), opened.entries, opened.layout
    # An untied output layer has its own parameter and is not a copy.
    tied = [pair for pair in layout.tied if shapes.keys() >= set(pair) and pair[0] not in entries]
    copies = {copy for copy, _ in tied}
    drop = [*layout.drop, *(re.escape(name).replace(r"\{\}", r"\d+") for name, _ in layout.zeros)]
    dropped = [name for name in shapes if name not in entries and name not in copies and _any(name, drop)]
    known = copies | set(dropped)
    mismatch = rules.compare(entries, {name: shape for name, shape in shapes.items() if name not in known})
    wrong = {
        "missing": [name for name in mismatch.missing if not _any(name, wish.allow_missing)],
        "unexpected": [name for name in mismatch.unexpected if not _any(name, wish.allow_unexpected)],
        "other shape": mismatch.reshaped,
    }
    taken = [name for name in entries if name in shapes]
    rows: dict[str, list[int]] = {}
    for name in taken:
        top = next(path for path in entries[name].rule.targets if path).split("/")[0]
        count = rows.setdefault(top, [0, 0])
        count[0] += 1
        count[1] += int(np.prod(shapes[name]))
    lines = [f"{'subtree':<14}{'tensors':>8}{'parameters':>16}"]
    lines += [f"{top:<14}{count:>8}{size:>16,}" for top, (count, size) in rows.items()]
    lines += [f"{'matched':<14}{len(taken):>8}{sum(size for _, size in rows.values()):>16,}"]
    listed = {
        "tied": [f"{copy} = {original}" for copy, original in tied],
        "dropped": dropped,
        "missing": mismatch.missing,
        "unexpected": mismatch.unexpected,
        "other shape": mismatch.reshaped,
    }
    lines += [f"{kind:<14}{len(names):>8}  {_some(names)}".rstrip() for kind, names in listed.items()]
    layers = {path for name in taken for path in entries[name].rule.targets if entries[name].layer is not None}
    wrong["missing"] += [
        f"{name} (other layers of this parameter are present)"
        for name in mismatch.missing
        if _any(name, wish.allow_missing) and layers.intersection(entries[name].rule.targets) - {None}
    ]
    bad = "; ".join(f"{kind}: {_some(names)}" for kind, names in wrong.items() if names)
    return Table(taken, tied, dropped, mismatch.missing, mismatch.unexpected, bad, "\n".join(lines))


def _digests(opened: Opened, ended: threading.Event) -> dict[str, str]:
    merged = opened.adapter.source.digests(ended) if opened.adapter else {}
    return opened.source.digests(ended) | merged


def _bytes(source: Source, name: str) -> int:
    return int(np.prod(source.shape(name))) * np.dtype(source.dtype(name)).itemsize


def _size(
    source: Source, name: str, entry: rules.Entry, whole: Mapping[str, tuple[int, ...]], casts: Mapping[str, Any]
) -> int:
    """Size of a source tensor in the checkpoint, in bytes."""
    size = 0
    for path in filter(None, entry.rule.targets):
        shape = whole[path] if entry.layer is None else whole[path][1:]
        size += int(np.prod(shape)) * np.dtype(casts.get(path, source.dtype(name))).itemsize
    return size


def _bits(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _dense(value: np.ndarray) -> np.ndarray:
    """A C-contiguous copy. Copying in memory order and transposing with torch is faster than one strided copy in NumPy."""
    if value.flags.c_contiguous:
        return value
    order = np.argsort([-step for step in value.strides], kind="stable")
    gathered = np.ascontiguousarray(value.transpose(order).view({2: np.int16, 4: np.int32}[value.itemsize]))
    return torch.from_numpy(gathered).permute(*np.argsort(order).tolist()).contiguous().numpy().view(value.dtype)


def _sizes(plan: Plan) -> dict[str, Any]:
    """Settings of the model's modules: {"Bloom": {"vocab": ...}}."""
    modules = plan.model if isinstance(plan.model, tuple) else (plan.model,)
    return {type(module).__name__: settings_of(module) for module in modules}


Resize = Callable[[Any, tuple[int, ...]], Any]
Resized = Mapping[str, tuple[tuple[int, ...], Resize]]  # path -> (new shape, resize function)


def _resized(module: ModuleType, plan: Plan, wish: Wish) -> Iterator[tuple[str, tuple[tuple[int, ...], Resize]]]:
    """(path, (new shape, resize function)) of the embeddings to resize.

    Raises:
      SourceError: the model has no such embedding, or the size does not fit its patches.
    """
    rows = {}
    if wish.image_size:
        patch = plan.like["vision"]["patch"]["kernel"].shape[-3] if "vision" in plan.like else 0
        if not patch or wish.image_size % patch:
            raise SourceError(
                f"--image_size {wish.image_size}: not a multiple of the patch size {patch}; give a multiple"
                if patch
                else f"--image_size {wish.image_size}: this model has no vision encoder; leave it out"
            )
        rows["vision/pos_embed"] = 1 + (wish.image_size // patch) ** 2
    if wish.frames:
        rows["vision/temporal_embed"] = wish.frames
    flat = flatten_dict(plan.like, sep="/")
    for path, count in rows.items():
        if path not in flat or path not in extra(module, "RESIZE"):
            flag = "--image_size" if path == "vision/pos_embed" else "--frames"
            raise SourceError(f"{flag}: this model has no {path} to resize; leave it out")
        if flat[path].shape[0] != count:
            yield path, ((count, *flat[path].shape[1:]), module.RESIZE[path])


def _casts(module: ModuleType, shapes: Mapping[str, Any], wanted: Mapping[str, str]) -> dict[str, Any]:
    """Path -> dtype of the parameters to cast. Later subtrees override earlier ones."""
    casts: dict[str, Any] = {}
    for subtree, dtype in wanted.items():
        if subtree == "frozen":
            found = [path for path in shapes if _any(path, extra(module, "FROZEN", ()))]
        else:
            found = [path for path in shapes if path == subtree or path.startswith(subtree + "/")]
        if not found:
            tops = ", ".join(sorted({path.split("/")[0] for path in shapes}))
            raise SourceError(f"--dtype {subtree}: unknown subtree; choose one of {tops}")
        casts |= dict.fromkeys(found, jnp.dtype(dtype))
    return casts


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
