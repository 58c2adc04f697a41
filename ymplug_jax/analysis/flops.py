"""Counts the floating-point operations of matrix products and convolutions in a traced program.

XLA's cost analysis counts the body of a scan once. This count multiplies it by the length of the scan.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from ymplug_jax.models import row_kernel


def count(function: Callable[..., Any], *args: Any) -> int:
    """FLOPs of one call, summed over all devices. A multiply-add counts as two.

    Args:
      function: a function that JAX can trace.
      *args: its arguments; ShapeDtypeStructs are enough.

    Raises:
      NotImplementedError: a while loop contains matrix products, so that their number is unknown.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            shape = _shape(eqn.invars[0])
            total += 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(shape[axis] for axis in contract)
        elif name == "conv_general_dilated":
            kernel = _shape(eqn.invars[1])
            out = eqn.params["dimension_numbers"].rhs_spec[0]
            total += 2 * math.prod(_shape(eqn.outvars[0])) * math.prod(kernel) // kernel[out]
        elif name == "scan":
            total += eqn.params["length"] * _count(eqn.params["jaxpr"].jaxpr)
        elif name == "pallas_call":
            columns = int(dict(eqn.params["metadata"] or {}).get(row_kernel.BESIDE, 1))  # only one head's are useful
            total += math.prod(eqn.params["grid_mapping"].grid) * _count(eqn.params["jaxpr"]) // columns
        elif name == "shard_map":
            mesh = eqn.params["mesh"]
            devices = math.prod(mesh.shape[axis] for axis in eqn.params["newly_manual_axes"])
            total += devices * _count(eqn.params["jaxpr"])
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in eqn.params["branches"])
        elif name == "while":
            if inner := _count(eqn.params["body_jaxpr"].jaxpr):
                raise NotImplementedError(f"a while loop of unknown length with {inner} FLOPs per iteration")
        else:
            total += sum(_count(inner) for inner in _inner(eqn.params))
    return total


def _shape(variable: Any) -> tuple[int, ...]:
    """Shape of an operand or result, which are untyped in JAX."""
    return variable.aval.shape


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
