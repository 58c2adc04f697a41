"""Floating-point operations of matrix products and convolutions, counted in the program as it is traced.

XLA's own count takes a scanned layer once; here a scan counts as often as it runs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count(function: Callable, *args: Any) -> int:
    """FLOPs of one call, over all devices; arguments may be abstract. A multiplication and an addition are two.

    Raises:
      NotImplementedError: a loop whose length is not known.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contract)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval.shape
            out = eqn.params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[out]
        elif name == "scan":
            total += eqn.params["length"] * _count(eqn.params["jaxpr"].jaxpr)
        elif name == "pallas_call":
            total += math.prod(eqn.params["grid_mapping"].grid) * _count(eqn.params["jaxpr"])
        elif name == "shard_map":
            mesh = eqn.params["mesh"]
            devices = math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"])
            total += devices * _count(eqn.params["jaxpr"])
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in eqn.params["branches"])
        elif name == "while":
            if inner := _count(eqn.params["body_jaxpr"].jaxpr):
                raise NotImplementedError(f"a while loop of {inner} FLOPs a turn")
        else:
            total += sum(_count(inner) for inner in _inner(eqn.params))
    return total


def _inner(params: dict[str, Any]) -> list[core.Jaxpr]:
    found = []
    for name, value in params.items():
        if name in ("fwd_jaxpr_thunk", "bwd", "jvp_jaxpr_fun"):
            continue
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found
