"""Opens the parameters of an Orbax item folder one by one, so that parts of them can be read."""

import json
from typing import Any

import tensorstore
from etils import epath


def check_manifest(place: epath.Path) -> None:
    """Read the manifest of an Orbax item folder. Orbax reads it in many tasks at once, each of which prints a traceback if it is damaged.

    Raises:
      ValueError, OSError: the manifest is damaged.
    """
    if (place / "manifest.ocdbt").exists():
        base = str(place) if "://" in str(place) else f"file://{place}"
        tensorstore.KvStore.open({"driver": "ocdbt", "base": f"{base}/"}).result().read("any").result()


def open_leaf(place: epath.Path, path: str, *, cache: int = 0) -> tensorstore.TensorStore:
    """Open one parameter without reading its values.

    Args:
      place: an Orbax item folder, local or gs://.
      path: of the parameter, such as "llm/blocks/attn/q/kernel".
      cache: bytes of decoded chunks to keep in memory.

    Raises:
      ValueError, AttributeError, OSError: the folder is damaged.
    """
    driver = "zarr3" if json.loads((place / "_METADATA").read_text()).get("use_zarr3") else "zarr"
    name = path.replace("/", ".")
    base = str(place) if "://" in str(place) else f"file://{place}"
    if (place / "manifest.ocdbt").exists():
        kvstore: Any = {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}
    else:
        kvstore = f"{base}/{name}/"
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": cache}})
    return tensorstore.open({"driver": driver, "kvstore": kvstore}, open=True, context=context).result()
