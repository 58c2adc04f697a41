"""The attention kernels: on which devices they run, which are turned off, and what a program asks of them."""

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

from ymplug_jax.core import sharding
from ymplug_jax.models.frame_kernel import over_frames
from ymplug_jax.models.row_kernel import LOWEST, Block, attention, block_of

__all__ = [
    "KERNELS",
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

KERNELS = {"tpu_rows": "tpu", "tpu_frames": "tpu", "cudnn": "nvidia"}  # name -> the devices that it runs on


class Use(NamedTuple):
    """What a program asks of a kernel, the batch apart."""

    kernel: str
    length: int  # L; T of frames
    keys: int  # S; P of frames
    heads: int  # N
    groups: int  # K
    width: int  # H
    dtype: str
    causal: bool = False
    masked: bool = False  # a padding mask
    alibi: bool = False

    def text(self) -> str:
        """For a line of the log."""
        what = ", ".join(name for name in ("causal", "masked", "alibi") if getattr(self, name))
        size = f"{self.length} x {self.keys}, {self.heads} heads"
        size += "" if self.groups == self.heads else f" on {self.groups}"
        return f"{size} of {self.width}, {self.dtype}" + (f", {what}" if what else "")


_OFF: ContextVar[frozenset[str]] = ContextVar("kernels that are off", default=frozenset())
_USES: ContextVar[set[Use] | None] = ContextVar("uses of kernels", default=None)


@contextlib.contextmanager
def without(names: Iterable[str]) -> Iterator[None]:
    """Programs that are traced inside do without these kernels: plain XLA computes the same."""
    token = _OFF.set(_OFF.get() | frozenset(names))
    try:
        yield
    finally:
        _OFF.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[set[Use]]:
    """The set that holds afterwards what programs traced inside ask of the kernels."""
    found: set[Use] = set()
    token = _USES.set(found)
    try:
        yield found
    finally:
        _USES.reset(token)


def uses(name: str) -> bool:
    """Whether programs traced here use the kernel: it runs on the current mesh's devices and is not turned off."""
    return name not in _OFF.get() and sharding.computes_on(KERNELS[name])


def note(use: Use) -> None:
    """Add to the set of `recording`, if there is one."""
    found = _USES.get()
    if found is not None:
        found.add(use)
