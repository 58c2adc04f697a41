"""Rules that map the tensors of a PyTorch checkpoint to a parameter tree and back.

A rule maps one kind of source tensor. Its layout names the axes of both sides, e.g. "(part n h) d -> d n h": the source tensor is
[3 * N * H, D] and is split into one part per target, each of shape [D, N, H]. The sizes come from the parameter tree, so one rule
serves both directions. A round trip is exact.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict


class Rule(NamedTuple):
    """Maps one kind of source tensor to parameters."""

    source: str  # name in the checkpoint; "{}" stands for the layer, whose index is the first axis of the target
    layout: str  # "axes of the source -> axes of a target"; "(a b)" merges axes, "1" is an axis of size one
    targets: tuple[str | None, ...]  # one path per index of the axis "part"; None: the part is dropped
    after: str = ""  # where the source's layers go to two stacks: path of the stack that holds the first layers
    at: tuple[int, ...] = ()  # index in the source of each layer of the target; (): 0, 1, .. or as `after` says


class Entry(NamedTuple):
    """One source tensor of a given parameter tree."""

    rule: Rule
    layer: int | None
    shape: tuple[int, ...]  # of the source tensor
    sizes: dict[str, int]  # of each axis word


class Piece(NamedTuple):
    """A part of a source tensor and the parameter, or the layer of a parameter, that it fills."""

    path: str
    layer: int | None
    value: np.ndarray


class Mismatch(NamedTuple):
    """Differences between the tensors of a checkpoint and those of a parameter tree; all empty if they match."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]  # "name: expected shape, found shape"


LINEAR = "out in -> in out"
SAME = "d -> d"


def linear(source: str, target: str) -> tuple[Rule, ...]:
    """A linear layer: weight and bias -> kernel and bias."""
    return Rule(f"{source}.weight", LINEAR, (f"{target}/kernel",)), Rule(f"{source}.bias", SAME, (f"{target}/bias",))


def norm(source: str, target: str) -> tuple[Rule, ...]:
    """A norm: weight and bias -> scale and bias."""
    return Rule(f"{source}.weight", SAME, (f"{target}/scale",)), Rule(f"{source}.bias", SAME, (f"{target}/bias",))


def heads_in(source: str, target: str) -> tuple[Rule, ...]:
    """A linear layer into attention heads."""
    return (
        Rule(f"{source}.weight", "(n h) d -> d n h", (f"{target}/kernel",)),
        Rule(f"{source}.bias", "(n h) -> n h", (f"{target}/bias",)),
    )


def heads_out(source: str, target: str) -> tuple[Rule, ...]:
    """A linear layer out of attention heads."""
    return (
        Rule(f"{source}.weight", "d (n h) -> n h d", (f"{target}/kernel",)),
        Rule(f"{source}.bias", SAME, (f"{target}/bias",)),
    )


def low_rank(source: str, target: str, inner: str = "d", outer: str = "m") -> tuple[Rule, ...]:
    """A LoRA adapter in the PEFT layout: A [R, in] and B [out, R] -> a and b.

    Args:
      source: name of the linear layer.
      target: path of the adapter.
      inner: axes of the layer's input, "n h" for heads.
      outer: axes of the layer's output.
    """
    merged = [f"({axes})" if " " in axes else axes for axes in (inner, outer)]
    return (
        Rule(f"{source}.lora_A.weight", f"r {merged[0]} -> {inner} r", (f"{target}/a",)),
        Rule(f"{source}.lora_B.weight", f"{merged[1]} r -> r {outer}", (f"{target}/b",)),
    )


def under(source: str, target: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of a submodule, with prefixes added to source names and target paths."""
    return tuple(
        r._replace(
            source=source + r.source,
            targets=tuple(t and target + t for t in r.targets),
            after=r.after and target + r.after,
        )
        for r in rules
    )


def expand(rules: Sequence[Rule], tree: Mapping[str, Any]) -> dict[str, Entry]:
    """Expand the rules to all source tensors of a parameter tree. Rules without a target in the tree are skipped.

    Args:
      rules: rules of the model.
      tree: nested dict of arrays or `ShapeDtypeStruct`s.

    Returns:
      Source tensor name -> entry.

    Raises:
      ValueError: a parameter matches no rule or several rules, or only some targets of a rule exist, or they differ in shape.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()}
    entries: dict[str, Entry] = {}
    made: set[str] = set()
    for rule in rules:
        placed = [path for path in rule.targets if path]
        present = [path for path in placed if path in shapes]
        if not present:
            continue
        if len(present) < len(placed) or len({shapes[path] for path in present}) > 1:
            raise ValueError(f"{rule.source}: its targets {rule.targets} do not all exist in one shape: {shapes}")
        if twice := made.intersection(present):
            raise ValueError(f"parameter {min(twice)!r} is made by two rules; the second is {rule.source!r}")
        made.update(present)
        shape = shapes[present[0]]
        layers: Sequence[int | None] = [None]
        if "{}" in rule.source:
            layers, shape = range(shape[0]), shape[1:]
        first = _depth(shapes, rule.after) if rule.after else 0
        at = rule.at or range(first, first + len(layers))
        if len(at) != len(layers):
            raise ValueError(
                f"{rule.source}: {len(layers)} layers of {present[0]!r} come from layers {at} of the source"
            )
        source, target = _parse(rule.layout)
        if len(target) != len(shape):
            raise ValueError(
                f"{present[0]}: layout {rule.layout!r} has {len(target)} axes but the parameter has {len(shape)}"
            )
        sizes = dict(zip(target, shape, strict=True)) | {"part": len(rule.targets), "1": 1}
        merged = tuple(math.prod(sizes[word] for word in group) for group in source)
        for layer in layers:
            name = rule.source if layer is None else rule.source.format(at[layer])
            entries[name] = Entry(rule, layer, merged, sizes)
    if bare := sorted(set(shapes) - made):
        raise ValueError(f"no rule makes the parameter {bare[0]!r} ({len(bare)} such parameters)")
    return entries


def compare(entries: Mapping[str, Entry], shapes: Mapping[str, Sequence[int]]) -> Mismatch:
    """Tensors that are missing, unexpected or of another shape, given the tensor shapes of a checkpoint."""
    reshaped = [
        f"{name}: expected {entries[name].shape}, found {tuple(shape)}"
        for name, shape in shapes.items()
        if name in entries and tuple(shape) != entries[name].shape
    ]
    return Mismatch(sorted(set(entries) - set(shapes)), sorted(set(shapes) - set(entries)), sorted(reshaped))


def pieces(entry: Entry, tensor: np.ndarray) -> Iterator[Piece]:
    """Split a source tensor into its parameters. The values are views where possible."""
    order, flat = _order(entry)
    values = tensor.reshape(flat).transpose(order).reshape(len(entry.rule.targets), *_target_shape(entry))
    for path, value in zip(entry.rule.targets, values, strict=True):
        if path:
            yield Piece(path, entry.layer, value)


def tensor_of(entry: Entry, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
    """One source tensor from a flat parameter tree, the inverse of `pieces`. Dropped parts become zeros."""
    found = {path: np.asarray(leaves[path]) for path in entry.rule.targets if path}
    if entry.layer is not None:
        found = {path: value[entry.layer] for path, value in found.items()}
    zeros = np.zeros_like(next(iter(found.values())))
    values = [found[path] if path else zeros for path in entry.rule.targets]
    order, flat = _order(entry)
    moved = np.stack(values).reshape([flat[axis] for axis in order])
    return moved.transpose(np.argsort(order)).reshape(entry.shape)


def to_torch(rules: Sequence[Rule], tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Convert a parameter tree, or one of the same structure such as gradients, to source tensors by name."""
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}
    return {name: tensor_of(entry, leaves) for name, entry in expand(rules, tree).items()}


def _depth(shapes: Mapping[str, tuple[int, ...]], stack: str) -> int:
    """Number of layers of the stack at a path."""
    return next((shape[0] for path, shape in shapes.items() if path.startswith(f"{stack}/")), 0)


def _parse(layout: str) -> tuple[list[list[str]], list[str]]:
    """ "(part n h) d -> d n h" -> ([["part", "n", "h"], ["d"]], ["d", "n", "h"])."""
    source, target = layout.split("->")
    groups = [group.strip("()").split() for group in re.findall(r"\([^)]*\)|[^\s()]+", source)]
    return groups, target.split()


def _order(entry: Entry) -> tuple[list[int], list[int]]:
    """(permutation of the unmerged source axes to: ones, part, target axes; sizes of the unmerged source axes)."""
    source, target = _parse(entry.rule.layout)
    words = [word for group in source for word in group]
    ones = [axis for axis, word in enumerate(words) if word == "1"]
    order = ones + [words.index(word) for word in ("part", *target) if word in words]
    return order, [entry.sizes[word] for word in words]


def _target_shape(entry: Entry) -> list[int]:
    return [entry.sizes[word] for word in _parse(entry.rule.layout)[1]]
