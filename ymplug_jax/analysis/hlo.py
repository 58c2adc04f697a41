"""Reads the communication and memory traffic of a compiled program from the text of XLA's optimised module.

The result of each collective is counted by kind and mesh axis. Instructions in a loop count once per iteration.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
KERNEL = 'custom_call_target="tpu_custom_call"'  # the project's Pallas kernels, which compute matrix products
_SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([\d,]*)\](\{[^{}]*\})?")
_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "iota",
    "domain",
)


class Op(NamedTuple):
    """One HLO instruction."""

    name: str
    kind: str
    type: str  # result type with layouts
    operands: tuple[str, ...]
    text: str  # the whole line


class Cost(NamedTuple):
    """The TPU compiler's cycle estimate for the instructions of one operation of the program."""

    operation: str  # e.g. "backward vision/blocks/mlp/up/dot_general"; "again" marks recomputation in the backward pass
    product: bool  # whether it contains a matrix product
    times: float  # instructions executed per run of the program
    cycles: float  # estimated cycles per run


class Traffic(NamedTuple):
    """Traffic of one device in one run of the program."""

    collectives: dict[str, dict[str, float]]  # kind -> mesh axes ("data", "data,fsdp") -> bytes of the results
    product_bytes: float  # HBM traffic of instructions with a matrix product
    other_bytes: float
    kernel_bytes: float = 0.0  # the part of product_bytes in Pallas kernels
    cycles: float = 0.0  # libtpu's estimate; it has none for kernels and some copies
    costs: tuple[Cost, ...] = ()  # the cycles by operation, largest first


class Collective(NamedTuple):
    """One instruction that communicates between devices."""

    kind: str  # one of COLLECTIVES
    axes: str  # mesh axes along which the members of a group differ, e.g. "data" or "data,fsdp"
    shapes: tuple[str, ...]  # shapes of the results on one device, e.g. "bf16[8,128]"
    size: float  # bytes of the results on one device
    times: float  # executions per run of the program
    in_loop: bool


def traffic(text: str, mesh: Mapping[str, int]) -> Traffic:
    """Traffic of an optimised module.

    Args:
      text: the module, `compiled.as_text()`.
      mesh: axis name -> size, in the order of the mesh that the module was compiled for.
    """
    computations, entry = _parse(text)
    sent: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in _sent(computations, entry, mesh):
        sent[one.kind][one.axes] += one.times * one.size
    product_bytes = other_bytes = kernels = 0.0
    costs: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for op, table, times, _ in _executed(computations, entry):
        inner = computations.get(_called(op, "calls"), []) if op.kind == "fusion" else []
        product = any(part.kind in ("convolution", "dot") or KERNEL in part.text for part in (*inner, op))
        if found := re.search(r'"estimated_cycles":"(\d+)"', op.text):
            name = re.search(r'op_name="([^"]*)"', op.text)
            cost = costs[place(name[1] if name else op.kind), product]
            cost[0] += times
            cost[1] += times * int(found[1])
        if _reached(op, computations) or op.kind.removesuffix("-start") in COLLECTIVES:
            continue
        if op.kind not in _FREE and not op.kind.endswith(("-done", "-update")):
            size = times * _bytes(op, table, inner, computations)
            product_bytes += size if product else 0
            other_bytes += 0 if product else size
            kernels += size if KERNEL in op.text else 0
    listed = sorted((Cost(*key, *cost) for key, cost in costs.items()), key=lambda cost: -cost.cycles)
    cycles = sum(cost.cycles for cost in listed)
    by_kind = {kind: dict(axes) for kind, axes in sent.items()}
    return Traffic(by_kind, product_bytes, other_bytes, kernels, cycles, tuple(listed))


def place(path: str) -> str:
    """Pass and module of an instruction, from the `op_name` that JAX gave it."""
    way = "backward " if "transpose(jvp(" in path else "forward " if "jvp(" in path else ""
    way += "again " if "rematted_computation" in path else ""
    dull = r"jit\([^/]*\)|(transpose\()?jvp\([^/]*\)|while|body|closed_call|checkpoint|rematted_computation|\w+\._run"
    return way + "/".join(part for part in path.split("/") if not re.fullmatch(dull, part))


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """Every collective between devices in an optimised module.

    libtpu overlaps some collectives with a chain of fusions and repeats the instruction in each of them. Such a collective counts
    once.

    Args:
      text: the module, `compiled.as_text()`.
      mesh: axis name -> size, in the order of the mesh that the module was compiled for.
    """
    return _sent(*_parse(text), mesh)


def _sent(computations: Mapping[str, list[Op]], entry: str, mesh: Mapping[str, int]) -> list[Collective]:
    found, chains = [], set()
    for op, _, times, in_loop in _executed(computations, entry):
        for part in computations.get(_called(op, "calls"), []) if op.kind == "fusion" else [op]:
            if part.kind.removesuffix("-start") not in COLLECTIVES:
                continue
            if op.kind == "fusion":
                channel = re.search(r"channel_id=\d+", part.text)
                if channel and channel[0] in chains:
                    continue
                chains.add(channel[0] if channel else part.name)
            kind, axes, size, shapes = _collective(part, mesh)
            if axes:
                found.append(Collective(kind, axes, shapes, size, times, in_loop))
    return found


def _executed(
    computations: Mapping[str, list[Op]], name: str, times: float = 1, in_loop: bool = False
) -> Iterator[tuple[Op, dict[str, Op], float, bool]]:
    """Yield every executed instruction: (instruction, its computation by name, executions, whether in a loop).

    Of a conditional, the first branch is taken.
    """
    table = {op.name: op for op in computations[name]}
    for op in table.values():
        yield op, table, times, in_loop
        if reached := _reached(op, computations):
            inner, trips = reached
            yield from _executed(computations, inner, times * trips, in_loop or op.kind == "while")


def _reached(op: Op, computations: Mapping[str, list[Op]]) -> tuple[str, int] | None:
    """The computation that an instruction calls and the number of calls; None if it calls none."""
    if op.kind == "while":
        return _called(op, "body"), _trips(op, computations[_called(op, "condition")])
    if op.kind in ("call", "async-start"):
        inner = _called(op, "to_apply") or _called(op, "calls")
        return (inner, 1) if inner else None
    if op.kind == "conditional":
        branches = re.findall(r"%([\w.\-]+)", op.text[op.text.find("branch_computations") :].split("}")[0])
        return (branches[0], 1) if branches else None
    return None


def _parse(text: str) -> tuple[dict[str, list[Op]], str]:
    computations: dict[str, list[Op]] = {}
    entry, ops = "", None
    for line in text.splitlines():
        if ops is None:
            if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                ops = computations.setdefault(match[2], [])
                entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            ops = None
        elif match := re.match(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)", line):
            name, shape, kind, rest = match.groups()
            arguments = rest.split("), ")[0] if "), " in rest else rest
            ops.append(Op(name, kind, shape, tuple(re.findall(r"%([\w.\-]+)", arguments)), line))
    return computations, entry


def _called(op: Op, key: str) -> str:
    match = re.search(rf"\b{key}=%?([\w.\-]+)", op.text)
    return match[1] if match else ""


def _trips(op: Op, condition: list[Op]) -> int:
    """Trip count of a loop: the one that XLA states, or the constant that the loop's counter is compared with."""
    if match := re.search(r"known_trip_count[^0-9]*(\d+)", op.text):
        return int(match[1])
    bounds = [int(m[1]) for part in condition if (m := re.search(r"= s32\[\]\S* constant\((\d+)\)", part.text))]
    return max(bounds, default=1)


def _size(shape: str, hbm_only: bool = False) -> float:
    """Bytes of a type, summed over tuples. `hbm_only` leaves out buffers in on-chip memory."""
    total = 0.0
    for dtype, dims, layout in _SHAPE.findall(shape):
        if hbm_only and re.search(r"S\([1-9]\)", layout):
            continue
        digits = re.search(r"\d+", dtype)
        width = _SIZES.get(
            dtype, int(digits[0]) / 8 if digits and dtype[0] in "su" else 1 if dtype.startswith("f8") else 0
        )
        total += width * math.prod(int(size) for size in dims.split(",") if size)
    return total


def _bytes(op: Op, table: Mapping[str, Op], inner: Sequence[Op], computations: Mapping[str, list[Op]]) -> float:
    """HBM bytes that one instruction reads and writes. Of a sliced operand only the slice counts."""
    if op.kind in ("copy-start", "slice-start"):
        places = _SHAPE.findall(op.type)
        sides = 1 + (not re.search(r"S\([1-9]\)", places[0][2]) and not re.search(r"S\([1-9]\)", places[1][2]))
        return sides * min(_size(f"{dtype}[{dims}]") for dtype, dims, _ in places[:2])
    reads = [table[name].type if name in table else "" for name in op.operands]
    if op.kind in ("dynamic-slice", "slice", "gather"):
        return 2 * _size(op.type, hbm_only=True)
    if op.kind == "dynamic-update-slice":
        return 2 * _size(reads[1], hbm_only=True)
    if not inner:
        return _size(op.type, hbm_only=True) + sum(_size(shape, hbm_only=True) for shape in reads)
    by_name = {part.name: part for part in inner}
    total, written = 0.0, _size(op.type, hbm_only=True)
    for part in inner:
        if part.kind == "dynamic-update-slice" and _size(part.type) >= 0.5 * _size(op.type) / max(
            op.type.count("["), 1
        ):
            whole = _size(part.type)
            if written >= whole:  # written in place
                written += _size(by_name[part.operands[1]].type) - whole if part.operands[1] in by_name else -whole
        if part.kind == "parameter":
            number = re.search(r"parameter\((\d+)\)", part.text)
            shape = reads[int(number[1])] if number else ""
            total += min(_size(shape, hbm_only=True), _read(part.name, inner, computations))
    return total + max(written, 0.0)


def _read(name: str, ops: Sequence[Op], computations: Mapping[str, list[Op]]) -> float:
    """Bytes that a fusion reads of a parameter: those of its slices if it is only sliced, else infinity."""
    total = 0.0
    for user in ops:
        for position, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.kind in ("bitcast", "reshape"):
                total += _read(user.name, ops, computations)
            elif user.kind in ("dynamic-slice", "slice"):
                total += _size(user.type)
            elif user.kind == "fusion":
                inner = computations[_called(user, "calls")]
                total += sum(_read(p.name, inner, computations) for p in inner if f"parameter({position})" in p.text)
            elif not (user.kind == "dynamic-update-slice" and position == 0):
                return math.inf
    return total


def _collective(op: Op, mesh: Mapping[str, int]) -> tuple[str, str, float, tuple[str, ...]]:
    """(kind, mesh axes, bytes and shapes of the results). The axes are "" if every device is its own group."""
    kind, shape = op.kind.removesuffix("-start"), op.type
    if op.kind.endswith("-start") and shape.startswith("(("):
        shape = shape.split("), ", 1)[-1]  # ((operands), (results), ...)
    found = _SHAPE.findall(shape)
    if op.kind.endswith("-start") and kind != "all-reduce" and op.type.startswith("(") and not op.type.startswith("(("):
        found = found[1:2]  # (operand, result, flags...)
    group, axes = _group(op.text, mesh)
    shapes = tuple(f"{dtype}[{dims}]" for dtype, dims, _ in found)
    return kind, axes if group > 1 else "", sum(map(_size, shapes)), shapes


def _group(text: str, mesh: Mapping[str, int]) -> tuple[int, str]:
    """(devices in a group, mesh axes along which its members differ)."""
    sizes, total = list(mesh.values()), math.prod(mesh.values())
    mesh_form = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
    if match := re.search(mesh_form, text):
        lengths = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
        strides, step = {}, 1
        for name in reversed(lengths):
            strides[name], step = step, step * lengths[name]
        members = [0]
        for name in re.findall(r"'(\w+)'", match[4]):
            members = [m + strides[name] * i for m in members for i in range(lengths[name])]
        if match[2]:
            order = _iota(match[2], match[3])
            members = [order[m] for m in members]
    elif match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        members = _iota(match[2], match[3])[: int(match[1].split(",")[-1])]
    elif match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        members = [int(n) for n in match[1].split(",")]
    elif match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        members = [int(match[1]), int(match[2])]
    else:
        members = list(range(total))
    places = [_place(member % total, sizes) for member in members]
    names = [axis for i, axis in enumerate(mesh) if len({place[i] for place in places}) > 1]
    return len(members), ",".join(names) or "none"


def _iota(shape: str, permutation: str | None) -> list[int]:
    """The numbers 0, 1, ... in an array of shape `shape` ("2,8"), transposed by `permutation` ("1,0") and flattened."""
    dims = [int(n) for n in shape.split(",")]
    order = [int(n) for n in permutation.split(",")] if permutation else range(len(dims))
    strides = [math.prod(dims[i + 1 :]) for i in range(len(dims))]
    numbers = [0]
    for axis in order:
        numbers = [n + strides[axis] * i for n in numbers for i in range(dims[axis])]
    return numbers


def _place(number: int, sizes: list[int]) -> tuple[int, ...]:
    place = []
    for size in reversed(sizes):
        place.append(number % size)
        number //= size
    return tuple(reversed(place))
