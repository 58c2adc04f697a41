"""Summary of a profiler trace by operation, without TensorFlow or a viewer. A step of `benchmarks.device`.

`jax.profiler.ProfileData` reads the trace. Time is that of kernels on a GPU, of operations on a TPU, of thunks on a CPU.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

from ymplug_jax.analysis import hlo

# Operations that contain others. The inner ones have their own events, so these would count twice.
CONTAINERS = re.compile(r"(while|call|conditional|fori_loop)[.\d]*$")
# Kind of operation -> pattern of kernel or operation names; the first match counts.
KINDS = {
    "attention": r"fmha|flash|cudnn|tpu_custom_call",
    "products": r"gemm|cublas|cutlass|nvjet|xmma|wgmma|dot|convolution|conv_|matmul",
    "copies": r"memcpy|memset|copy|transpose|dynamic.update.slice|dynamic.slice|concatenate|broadcast",
    "reductions": r"reduce",
    "element-wise": r"fusion|loop|wrapped|add|multiply",
}


def summary(folder: Path, program: str, runs: int, top: int = 15) -> dict[str, Any]:
    """Read the trace below `folder`.

    Args:
      folder: what `jax.profiler.trace` was given.
      program: text of the compiled program, which says where in the model an operation comes from.
      runs: of the program in the trace.
      top: how many operations are listed.

    Returns:
      busy_milliseconds of one run (on a CPU summed over its threads), kinds: share of each, top: the operations that took
      longest, each with its name, place in the model, kind, milliseconds and number in one run, and share.

    Raises:
      ValueError: no trace, or one without an operation of a device.
    """
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        raise ValueError(f"{folder}: no trace was written")
    spent: Counter[tuple[str, str]] = Counter()
    times: Counter[tuple[str, str]] = Counter()
    for name, kernel, nanoseconds in _events(files[-1]):
        spent[name, kernel] += nanoseconds
        times[name, kernel] += 1
    total = sum(spent.values())
    if not total:
        raise ValueError(f"{files[-1].name}: no operation of a device in it")
    paths = dict(re.findall(r'%?([\w.\-]+) = [^\n]*?op_name="([^"]*)"', program))
    places = {name: hlo.place(paths[name]) if name in paths else "" for name, _ in spent}
    kinds: Counter[str] = Counter()
    for (name, kernel), nanoseconds in spent.items():
        kinds[kind_of(name, kernel, places[name])] += nanoseconds
    listed = [
        {
            "operation": name,
            "kernel": kernel,
            "place": places[name],
            "kind": kind_of(name, kernel, places[name]),
            "milliseconds": nanoseconds / 1e6 / runs,
            "times": times[name, kernel] / runs,
            "share": nanoseconds / total,
        }
        for (name, kernel), nanoseconds in spent.most_common(top)
    ]
    shares = {kind: nanoseconds / total for kind, nanoseconds in kinds.most_common()}
    return {"busy_milliseconds": total / 1e6 / runs, "kinds": shares, "top": listed}


def kind_of(operation: str, kernel: str = "", place: str = "") -> str:
    """Kind of an operation, from its kernel's name or its own name and location: a key of KINDS, or "other"."""
    name = kernel if kernel and kernel != operation else f"{operation} {place}"
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def _events(file: Path) -> Iterator[tuple[str, str, float]]:
    """(operation, kernel, nanoseconds) of every event on the device."""
    with warnings.catch_warnings():  # the reader's types lack __module__, which Python 3.13 deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in ProfileData.from_file(str(file)).planes:
            device = plane.name.startswith("/device:")
            if not device and plane.name != "/host:CPU":
                continue
            for line in plane.lines:
                if device and not (line.name.startswith("Stream") or line.name == "XLA Ops"):
                    continue  # other lines repeat the same time by step or module
                for event in line.events:
                    operation = str(dict(event.stats).get("hlo_op", event.name if device else ""))
                    if operation and not CONTAINERS.match(operation):
                        yield operation, event.name if device else "", event.duration_ns
