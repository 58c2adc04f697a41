"""Registry of the fused attention kernels: their devices, which are disabled, and which uses a program makes of them."""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

from ymplug_jax.core import sharding
from ymplug_jax.models.frame_kernel import over_frames
from ymplug_jax.models.row_kernel import LANES, attention, block_of
from ymplug_jax.models.row_program import LOWEST, Block

__all__ = [
    "KERNELS",
    "LANES",
    "LOWEST",
    "Block",
    "Use",
    "attention",
    "block_of",
    "note",
    "over_frames",
    "recording",
    "uses",
    "without",
]

KERNELS = {"tpu_rows": "tpu", "tpu_frames": "tpu", "cudnn": "nvidia"}  # kernel -> the devices that it runs on


class Use(NamedTuple):
    """One use of a kernel by a program, up to the batch size."""

    kernel: str
    length: int  # number of queries L; for frames T
    keys: int  # number of keys S; for frames P
    heads: int  # number of query heads N
    groups: int  # number of key/value heads K
    width: int  # size of a head H
    dtype: str  # type of q, k and v
    causal: bool = False  # with a causal mask
    masked: bool = False  # with a padding mask
    alibi: bool = False  # with ALiBi
    packed: bool = False  # with segments
    beside: bool = False  # its heads lie side by side

    def text(self) -> str:
        """One-line description for the log."""
        what = ", ".join(name for name in ("causal", "masked", "alibi", "packed", "beside") if getattr(self, name))
        size = f"{self.length} x {self.keys}, {self.heads} heads"
        size += "" if self.groups == self.heads else f" on {self.groups}"
        return f"{size} of {self.width}, {self.dtype}" + (f", {what}" if what else "")


_OFF: ContextVar[frozenset[str]] = ContextVar("disabled kernels", default=frozenset())
_USES: ContextVar[set[Use] | None] = ContextVar("uses of kernels", default=None)


@contextlib.contextmanager
def without(names: Iterable[str]) -> Iterator[None]:
    """Disable these kernels for programs traced inside; plain XLA computes the same."""
    token = _OFF.set(_OFF.get() | frozenset(names))
    try:
        yield
    finally:
        _OFF.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[set[Use]]:
    """Collect the kernel uses of programs traced inside; the yielded set is complete afterwards."""
    found: set[Use] = set()
    token = _USES.set(found)
    try:
        yield found
    finally:
        _USES.reset(token)


def uses(name: str) -> bool:
    """Whether programs traced here use the kernel: the current mesh's devices have it and it is not disabled."""
    return name not in _OFF.get() and sharding.computes_on(KERNELS[name])


def note(use: Use) -> None:
    """Add a use to the set of `recording`, if one is active."""
    found = _USES.get()
    if found is not None:
        found.add(use)
