"""The other direction: a run's or a converted folder's parameters as safetensors under the names of the source."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore
from etils import epath

from ymplug_jax import checkpoint, progress, state
from ymplug_jax.convert import rules
from ymplug_jax.convert.plan import Layout, map_of
from ymplug_jax.convert.torch_file import SourceError

_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def to_torch(model: str, folder: Path, out: Path, layout: str | None = None) -> list[Path]:
    """Write model.safetensors, and adapter_model.safetensors where there are adapters, tensor by tensor; returns the files.

    Args:
      model: name of the map file.
      folder: a run (its newest step) or the folder of a conversion.
      out: folder, or the file model.safetensors itself.
      layout: names to write; None: those that the conversion read, else the first that the map knows.

    Raises:
      SourceError, CheckpointError: no checkpoint there, or not of this model.
      FileExistsError: the file is there.
    """
    module, record = map_of(model), folder / "conversion.json"
    facts = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if facts.get("model") != model:
        facts = {}
    layout = layout or facts.get("layout") or next(iter(module.LAYOUTS))
    if layout not in module.LAYOUTS:
        raise SourceError(f"--layout {layout}: model {model} has {', '.join(module.LAYOUTS)}")
    named: Layout = module.LAYOUTS[layout]
    leaves = _leaves(folder)
    wanted = {path for rule in named.rules for path in rule.targets} & set(leaves)
    if not wanted:
        raise SourceError(f"{folder}: none of its parameters belong to model {model}")
    like = state.unflatten(
        {p: jax.ShapeDtypeStruct(leaves[p].shape, leaves[p].dtype.numpy_dtype) for p in sorted(wanted)}
    )
    entries = rules.expand(named.rules, like)
    zeros = {
        pattern.format(entry.layer): name
        for pattern, other in named.zeros
        for name, entry in entries.items()
        if entry.rule.source == other
    }
    copies = {copy: original for copy, original in facts.get("tied", ()) if original in entries}
    sources = {name: name for name in entries} | copies | zeros
    file = out if out.suffix == ".safetensors" else out / "model.safetensors"
    adapters = {name for name in sources if ".lora_" in name}
    files = [(file, [name for name in sources if name not in adapters])]
    if adapters:
        files.append((file.with_name("adapter_model.safetensors"), sorted(adapters)))

    def tensor(name: str) -> np.ndarray:
        entry = entries[sources[name]]
        parts = {p: leaves[p] if entry.layer is None else leaves[p][entry.layer] for p in entry.rule.targets if p}
        values = {p: np.asarray(part.read().result()) for p, part in parts.items()}
        value = rules.tensor_of(entry._replace(layer=None), values)
        return np.zeros_like(value) if name in zeros else value

    def form(name: str) -> tuple[str, tuple[int, ...]]:
        entry = entries[sources[name]]
        return leaves[next(p for p in entry.rule.targets if p)].dtype.name, entry.shape

    for path, names in files:
        if path.exists():
            raise FileExistsError(f"{path} is there already; remove it or give another --out")
        _write(path, {name: form(name) for name in names}, ((name, tensor(name)) for name in names))
    return [path for path, _ in files]


def _leaves(folder: Path) -> dict[str, tensorstore.TensorStore]:
    """Every stored parameter, opened and not read."""
    leaves = {}
    for place in checkpoint.places(str(folder)):
        metadata = json.loads((place / "_METADATA").read_text())
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        for path in checkpoint.stored_in(place):
            name = path.replace("/", ".")
            base = str(place) if "://" in str(place) else f"file://{place}"
            if (place / "manifest.ocdbt").exists():
                kvstore: Any = {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}
            else:
                kvstore = f"{base}/{name}/"
            context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}})
            leaves[path] = tensorstore.open({"driver": driver, "kvstore": kvstore}, open=True, context=context).result()
    return leaves


def _write(
    file: Path, forms: Mapping[str, tuple[str, tuple[int, ...]]], tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """A safetensors file, written as the tensors come; it gets its name when it is whole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in forms.items():
        begin, end = end, end + int(np.prod(shape)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = epath.Path(file.with_name(file.name + ".partial"))
    with partial.open("wb") as stream, progress.bar(total=end, unit="B", scale=True, desc=file.name) as bar:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, value in tensors:
            stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            bar.update(value.nbytes)
    partial.rename(file)
