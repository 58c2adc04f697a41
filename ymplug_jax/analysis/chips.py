"""Peak rates of accelerators, and a roofline model of the step time.

Sources: Google Cloud's documentation of TPU v4, v5e, v5p and v6e; "How to scale your model" (Austin et al., 2025, part 2) for the
links between TPUs; NVIDIA's data sheets (dense bfloat16).
"""

from collections.abc import Mapping
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """Memory and peak rates of one chip."""

    hbm: float  # memory for a program in bytes; for TPUs the limit that their compiler states
    hbm_rate: float  # HBM bandwidth, bytes/s
    flops: float  # bfloat16 FLOP/s
    link: float = 0.0  # bytes/s in one direction over one link; a chip has two links per torus axis
    network: float = 0.0  # bytes/s out of the slice: the chip's share of its host's network
    clock: float = 0.0  # Hz


CHIPS: Mapping[str, Chip] = {
    "v4": Chip(31.25 * GIB, 1.23e12, 2.75e14, link=4.5e10, network=6.25e9, clock=1.05e9),
    "v5e": Chip(15.75 * GIB, 8.2e11, 1.97e14, link=4.5e10, network=3.125e9, clock=1.5e9),
    "v5p": Chip(95.74 * GIB, 2.76e12, 4.59e14, link=9e10, network=6.25e9, clock=1.75e9),
    "v6e": Chip(31.25 * GIB, 1.64e12, 9.18e14, link=9e10, network=1.25e10, clock=1.75e9),
    "a100": Chip(80e9, 2.04e12, 3.12e14),
    "h100": Chip(80e9, 3.35e12, 9.89e14),
    "h200": Chip(141e9, 4.8e12, 9.89e14),
}
_KINDS = {"v5 lite": "v5e", "v5e": "v5e", "v6 lite": "v6e", "v6e": "v6e", "v5p": "v5p", "v5": "v5p", "v4": "v4"}


def of(device_kind: str) -> Chip | None:
    """The chip of a JAX device kind such as "TPU v5 lite" or "NVIDIA H200"; None if it is not in `CHIPS`."""
    kind = device_kind.lower()
    names = [*_KINDS.items(), *((name, name) for name in CHIPS)]
    return next((CHIPS[name] for part, name in names if part in kind), None)


def leaving(kind: str, size: float, group: int, slices: int = 1) -> tuple[float, float]:
    """Bytes that one chip sends in a ring collective: (over the links of its slice, over the network between slices).

    Args:
      kind: XLA's name of the collective, e.g. "all-reduce".
      size: bytes of its result on one chip.
      group: number of participating chips.
      slices: number of slices that the chips are spread over evenly. Each slice reduces or gathers internally first.
    """
    inside = group // slices
    full = {"all-reduce": 2.0, "reduce-scatter": float(group)}.get(kind, 1.0) * size
    if kind == "collective-permute":
        return (size, 0.0) if slices == 1 else (0.0, size)
    return full * (inside - 1) / max(inside, 1), full * (slices - 1) / slices / max(inside, 1)


def roofline(
    chip: Chip, *, flops: float, product_bytes: float, other_bytes: float, links: float, network: float
) -> dict[str, float]:
    """Roofline estimate of one step on one chip.

    Matrix products take the longer of their arithmetic and their memory traffic. All other operations are bound by memory traffic.
    Communication is assumed not to overlap with computation, which is the worst case.

    Args:
      chip: an entry of `CHIPS`.
      flops: FLOPs of matrix products, with recomputation.
      product_bytes: HBM traffic of matrix products.
      other_bytes: HBM traffic of all other operations.
      links: bytes sent over the links of the slice.
      network: bytes sent to other slices.

    Returns:
      Seconds for "products", "memory", "links" and "network", and their sum "step".
    """
    parts = {
        "products": max(flops / chip.flops, product_bytes / chip.hbm_rate),
        "memory": other_bytes / chip.hbm_rate,
        "links": links / (2 * chip.link) if chip.link else 0.0,
        "network": network / chip.network if chip.network else 0.0,
    }
    return parts | {"step": sum(parts.values())}
