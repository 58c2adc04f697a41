"""Locates the tensors of a TorchScript archive, such as OpenAI's CLIP files, without running its code.

The archive's pickle refers to scripted classes and tensors. A class of `__torch__` is read as a plain object with attributes and a
tensor as the location of its bytes. Any other name is refused, so nothing of the archive is called.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

DTYPES = {
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "int64": 8, "int32": 4, "int16": 2}

Place = tuple[
    int, str, tuple[int, ...], tuple[int, ...] | None, str
]  # byte offset, type, shape, strides, archive member


class Unsafe(ValueError):
    """The pickle refers to a name that a scripted model does not need."""


class _Module:
    """The attributes of an object of a scripted class."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _Tensor:
    """The arguments with which torch would build a tensor."""

    def __init__(self, storage: tuple, offset: int, shape: tuple, strides: tuple, *_: Any):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


def _parameter(tensor: "_Tensor", *_: Any) -> "_Tensor":
    return tensor


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return _Tensor if name == "_rebuild_tensor_v2" else _parameter
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith(("build_", "restore_type_tag")):
            return lambda values, *_: values
        if module == "__torch__" or module.startswith("__torch__."):
            return type(name, (_Module,), {})
        raise Unsafe(f"its pickle refers to {module}.{name}")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        kind, dtype, key, *_ = pid
        if kind != "storage" or dtype not in DTYPES.values():
            raise Unsafe(f"its pickle refers to {kind!r}")
        return dtype, key


def tensors(file: Path, archive: zipfile.ZipFile) -> dict[str, Place]:
    """State dict name -> location of the tensor.

    Raises:
      Unsafe: the pickle refers to a class or function other than tensors and scripted modules.
      KeyError, ValueError: the archive is damaged.
    """
    (root,) = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    with archive.open(f"{root}data.pkl") as stream:
        try:
            model = _Reader(stream).load()
        except (TypeError, AttributeError, IndexError) as error:
            raise Unsafe(f"its pickle is not that of a scripted model: {error}") from None
    found: dict[str, Place] = {}
    stack, seen = [("", model)], set()
    while stack:
        prefix, value = stack.pop()
        if isinstance(value, _Tensor):
            dtype, key = value.storage
            info = archive.getinfo(f"{root}data/{key}")
            if not all(isinstance(n, int) and n >= 0 for n in (value.offset, *value.shape, *value.strides)):
                raise ValueError(f"{prefix} has an invalid shape")
            at = data_offset(file, info) + value.offset * _BYTES.get(dtype, 1)
            dense = value.strides == _dense(value.shape)
            found[prefix] = (at, dtype, tuple(value.shape), None if dense else tuple(value.strides), info.filename)
        elif isinstance(value, _Module) and id(value) not in seen:
            seen.add(id(value))
            stack += [(f"{prefix}.{name}" if prefix else name, part) for name, part in vars(value).items()]
    return dict(sorted(found.items()))


def data_offset(file: Path, info: zipfile.ZipInfo) -> int:
    """Byte offset of an uncompressed member's content in the file.

    Raises:
      ValueError: the member is compressed.
    """
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{info.filename} is compressed")
    with file.open("rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(30)
    name, extra = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + name + extra


def _dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= size
    return tuple(reversed(steps))
