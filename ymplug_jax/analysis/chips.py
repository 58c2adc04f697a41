"""What accelerators can do, and how long a step must therefore take.

Figures per chip: Google Cloud's documentation of TPU v4, v5e, v5p and v6e, and "How to scale your model" (Austin et al., 2025,
part 2) for the links; NVIDIA's data sheets (dense bfloat16).
"""

from collections.abc import Mapping
from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One chip. Rates are per second."""

    hbm: float  # bytes that a program can have; of TPUs as their compiler says
    hbm_rate: float  # bytes
    flops: float  # bfloat16
    link: float = 0.0  # bytes one way over one link to a neighbour; an axis of a torus has two
    network: float = 0.0  # bytes out of the slice, its share of the host's network
    clock: float = 0.0  # cycles


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
    """The chip that JAX calls so ("TPU v5 lite", "NVIDIA H200"); None: not in the table."""
    kind = device_kind.lower()
    names = [*_KINDS.items(), *((name, name) for name in CHIPS)]
    return next((CHIPS[name] for part, name in names if part in kind), None)


def leaving(kind: str, size: float, group: int, slices: int = 1) -> tuple[float, float]:
    """(bytes over links, bytes over the network) that leave one chip in a collective, by the ring algorithm.

    Args:
      kind: of the collective, as XLA calls it.
      size: bytes of its result on one chip.
      group: chips that take part.
      slices: among which they are spread evenly; each slice reduces or gathers within itself first.
    """
    inside = group // slices
    full = {"all-reduce": 2.0, "reduce-scatter": float(group)}.get(kind, 1.0) * size
    if kind == "collective-permute":
        return (size, 0.0) if slices == 1 else (0.0, size)
    return full * (inside - 1) / max(inside, 1), full * (slices - 1) / slices / max(inside, 1)


def roofline(
    chip: Chip, *, flops: float, product_bytes: float, other_bytes: float, links: float, network: float
) -> dict[str, float]:
    """Seconds of one step by what bounds them, for one chip, and their sum as the step's time.

    Matrix products take the longer of their arithmetic and their memory traffic; everything else only moves memory. Transfers
    between chips are taken to overlap with nothing, which is the worst case.

    Args:
      chip: see `CHIPS`.
      flops: of matrix products, recomputation included.
      product_bytes: HBM traffic of matrix products.
      other_bytes: HBM traffic of all else.
      links: bytes that leave the chip over the links of the slice.
      network: bytes that leave it for other slices.
    """
    parts = {
        "products": max(flops / chip.flops, product_bytes / chip.hbm_rate),
        "memory": other_bytes / chip.hbm_rate,
        "links": links / (2 * chip.link) if chip.link else 0.0,
        "network": network / chip.network if chip.network else 0.0,
    }
    return parts | {"step": sum(parts.values())}
