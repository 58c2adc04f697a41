"""Manifest of a data set built part by part. Standard library only.

`data_prep.build_shards --part NAME` builds the folder OUT/NAME, a data set of its own. `data_prep.join_parts` then writes OUT/manifest.json,
which names the parts and the SHA-256 of the manifest of each: a part that was built again no longer fits, until the parts are joined again.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ymplug_jax.data import schema


class Part(NamedTuple):
    """One part, as the manifest of the whole names it."""

    name: str  # its folder
    manifest_sha256: str


def is_joined(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is that of a set joined from parts."""
    return "parts" in manifest


def parts_of(manifest: Mapping[str, Any], split: str, file: str) -> list[Part]:
    """Return the parts that hold records of a split, in the order of their records.

    Args:
      manifest: of the joined set.
      split: name of the split.
      file: file of the manifest, for messages.

    Raises:
      FileNotFoundError: no part has the split.
      ValueError: the manifest is damaged.
    """
    try:
        splits = {name: set(entry["parts"]) for name, entry in manifest["splits"].items()}
        parts = [Part(str(part["name"]), str(part["manifest_sha256"])) for part in manifest["parts"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error!r}); join the parts again with data_prep.join_parts") from None
    if split not in splits:
        raise FileNotFoundError(
            f"{file}: no part has split {split!r}, they have {', '.join(sorted(splits))}; build it for the parts and join them "
            "again, or set config.data.train_split or config.data.eval_split to another one"
        )
    return [part for part in parts if part.name in splits[split]]


def check_parts(path: str, parts: Sequence[Part], manifests: Sequence[bytes | None]) -> None:
    """Check that the manifests of the parts are those that were joined.

    Args:
      path: folder of the joined set, for messages.
      parts: the parts.
      manifests: content of the manifest of each; None: there is none.

    Raises:
      FileNotFoundError: a part is missing, or is being built.
      ValueError: a part was built again after joining.
    """
    for part, content in zip(parts, manifests, strict=True):
        if content is None:
            raise FileNotFoundError(
                f"{path}/{part.name}/{schema.MANIFEST}: missing, so the part was moved or is being built; finish or copy it, or join the "
                f"other parts with python -m data_prep.join_parts --out {path} --parts"
            )
        if hashlib.sha256(content).hexdigest() != part.manifest_sha256:
            raise ValueError(
                f"{path}/{part.name}: built again or extended after the parts were joined; join them again with python -m "
                f"data_prep.join_parts --out {path}"
            )
