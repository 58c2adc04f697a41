"""All measurements on a bare accelerator machine with one command: `python -m benchmarks.device --out device.json`.

The steps, in order: fused attention against plain XLA, the pre-training step of the 1.3B model against PyTorch, MFU, captions
against Hugging Face's `generate`, peak memory, and a profile of the JAX step. Each result is printed and written immediately. A step
that fails or exceeds its time becomes one line of the report, and the next step runs. The whole command takes at most 590 s
(`--limit`).

The machine needs Python 3.12, jax with its plugin, flax, optax, etils, torch and transformers (README.md, "How fast is it here");
grain, TFDS, TensorFlow and ml_collections are not imported. Use `--size small` to try the command on a CPU.
"""

import argparse
import functools
import gc
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
# PyTorch uses the same device, so let JAX allocate memory on demand instead of reserving three quarters of it.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402  (after the setting above)
import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks import attention_parity, profile_summary, torch_captioner, torch_generate, torch_step  # noqa: E402
from benchmarks.device_report import Report  # noqa: E402
from benchmarks.device_sizes import SIZES, Size  # noqa: E402
from ymplug_jax.analysis import aot, bench  # noqa: E402

# Time limit of each step in seconds, in the order in which they run; scaled with `--limit`.
BUDGETS = {
    "attention": 90, "build": 170, "train": 50, "compiled": 130, "mfu": 15, "captions": 100, "memory": 5, "profile": 30
}  # fmt: skip
NEED_BUILD = {"train", "compiled", "mfu", "memory", "profile"}  # steps that need the compiled JAX training step
LIMIT = 590.0  # seconds for the whole command, imports included
WARM_UP = 3  # untimed training steps before the timed ones
PROFILED = 3  # training steps in the trace


class Bench:
    """The steps of the benchmark and the state they share."""

    def __init__(self, size: Size, dtype: str, report: Report):
        self.size, self.dtype, self.report = size, dtype, report
        self.torch_device = {"gpu": "cuda", "cpu": "cpu"}.get(jax.default_backend(), "")
        self.batch = torch_captioner.batch_of(size.model, size.batch, size.length)
        self.captioner: torch_captioner.Captioner | None = None
        self.step: torch_step.Ours | None = None
        self.medians: dict[str, float] = {}  # implementation -> seconds per training step
        self.memory: dict[str, dict[str, int | None]] = {}  # implementation -> bytes

    @property
    def ours(self) -> torch_step.Ours:
        """The JAX training step.

        Raises:
          RuntimeError: it could not be built.
        """
        if self.step is None:
            raise RuntimeError("the JAX training step was not built")
        return self.step

    def build(self) -> None:
        """Weights for all implementations, and the compiled training step."""
        began = time.perf_counter()
        self.captioner = torch_captioner.fresh(self.size.model, self.torch_device or "cpu", self.dtype)
        params = torch_captioner.to_jax(self.captioner, self.size.model)
        counts = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(params))}
        seconds = time.perf_counter() - began
        self.report.add(
            "build", "weights", counts | {"seconds": seconds}, f"{counts['parameters']:,} in {seconds:.1f} s"
        )
        began = time.perf_counter()
        self.step = torch_step.Ours(self.size.model, params, self.batch, self.dtype, keep_logits=False)
        value = {"trained": self.step.trained, "seconds": time.perf_counter() - began}
        self.report.add("build", "ours", value, f"{value['trained']:,} trained; compiled in {value['seconds']:.1f} s")

    def attention(self) -> None:
        """Fused attention against plain XLA, with gradients."""
        cases = attention_parity.cases(self.size.model, self.size.batch, self.size.length, self.size.long)
        for name, case in cases.items():
            try:
                found = attention_parity.measure(case, self.dtype, self.size.rounds)
            except Exception as error:  # report a kernel that does not compile, and go on with the other cases
                self.report.fail("attention", name, error)
                continue
            verdict = "agrees" if found["agrees"] else "DIFFERS"
            self.report.add(
                "attention", name, found,
                f"{verdict}: forward {found['forward_error']:.1e}, gradient {found['gradient_error']:.1e} (plain XLA "
                f"{found['plain_forward_error']:.1e}, {found['plain_gradient_error']:.1e}); "
                f"{found['milliseconds']:.2f} ms (plain {found['plain_milliseconds']:.2f}); kernel: {found['kernel']}",
            )  # fmt: skip

    def train(self) -> None:
        """The training step in JAX and in eager PyTorch."""
        self._time("train", {"PyTorch eager, classes": (False, False), "PyTorch eager": (True, False)})

    def compiled_step(self) -> None:
        """The training step with torch.compile, beside JAX. A separate step, because compilation takes minutes."""
        self._time("compiled", {"PyTorch compiled": (True, True)})

    def _time(self, step: str, forms: dict[str, tuple[bool, bool]]) -> None:
        """Time JAX and the PyTorch `forms` (name -> (tuned, compiled)), in this order and then in reverse."""
        makers: dict[str, Callable[[], Any]] = {"ours": lambda: self.ours}
        if not self.torch_device:
            self.report.fail(step, "PyTorch", f"skipped: no PyTorch for {jax.default_backend()} devices")
        elif self.captioner is not None:
            for name, (tuned, compiled) in forms.items():
                makers[name] = functools.partial(
                    torch_step.Theirs, self.captioner, self.batch, self.dtype, tuned=tuned, compiled=compiled
                )
        sides: dict[str, Any] = {}
        found: dict[str, dict[str, Any]] = {}
        for name, make in makers.items():
            try:
                sides[name], found[name] = self._first_order(name, make)
            except Exception as error:  # e.g. out of memory or no compiler: the others can still be timed
                self.report.fail(step, name, error)
                continue
            self._told(step, name, found)
        for name, side in reversed(sides.items()):
            side.step()  # warm up again after the other implementations ran
            found[name]["second_order_seconds"] = [torch_step.timed(side.step)[0] for _ in range(self.size.rounds)]
        for name in sides:
            self._told(step, name, found)

    def _first_order(self, name: str, make: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        before = self._peak(name)
        began = time.perf_counter()
        side = make()
        losses = [side.step()]
        ready = time.perf_counter() - began
        losses += [side.step() for _ in range(WARM_UP - 1)]
        seconds = [torch_step.timed(side.step)[0] for _ in range(self.size.rounds)]
        peak = self._peak(name)
        hidden = name == "ours" and before is not None and peak is not None and peak <= before
        self.memory.setdefault(name, {"peak_bytes": None if hidden else peak})
        return side, {"losses": losses, "seconds_to_first_step": ready, "first_order_seconds": seconds}

    def _peak(self, name: str) -> int | None:
        """Peak bytes in use by an implementation, counted by its framework: JAX since the start, PyTorch since the last call."""
        if name == "ours":
            return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        if self.torch_device != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak

    def _told(self, step: str, name: str, sides: dict[str, dict[str, Any]]) -> None:
        """Report an implementation with all of its times so far."""
        found, ours = sides[name], sides.get("ours")
        orders = [found[key] for key in ("first_order_seconds", "second_order_seconds") if key in found]
        low, median, high = (1e3 * float(x) for x in np.quantile(np.concatenate(orders), [0.1, 0.5, 0.9]))
        found["milliseconds"] = {"median": median, "p10": low, "p90": high}
        found["milliseconds_by_order"] = [1e3 * float(np.median(order)) for order in orders]
        found["batch_size"], found["samples_per_second"] = self.size.batch, 1e3 * self.size.batch / median
        if name != "ours" or step == "train" or name not in self.medians:
            self.medians[name] = median / 1e3
        line = f"{median:.1f} ms ({low:.1f} to {high:.1f}), {found['samples_per_second']:.1f} samples/s"
        if len(orders) > 1:
            line += ", by order " + " and ".join(f"{x:.1f}" for x in found["milliseconds_by_order"])
        if ours is not None and name != "ours":
            found["times_ours"] = median / ours["milliseconds"]["median"]
            line += f", {found['times_ours']:.2f} x ours"
            if step == "train":  # in later steps JAX starts from trained weights, so losses differ
                close = np.allclose(found["losses"], ours["losses"], rtol=1e-4 if self.dtype == "float32" else 1e-2)
                found["same_losses"] = bool(close)
                line += "" if close else ", LOSSES DIFFER"
        self.report.add(step, name, found, f"{line}; losses " + " ".join(f"{x:.4f}" for x in found["losses"]))

    def mfu(self) -> None:
        """Model FLOPs utilisation of the training step."""
        flops = aot.model_flops(self.ours.run)
        peak, source = bench.peak_flops(self.ours.run.mesh.devices.flatten())
        if not self.medians:
            raise RuntimeError("no training step was timed")
        for name, seconds in self.medians.items():
            value = {"mfu": flops / seconds / peak, "model_flops": flops, "peak_flops": peak, "peak_source": source}
            line = f"{100 * value['mfu']:.1f} % of {peak / 1e12:.1f} TFLOP/s ({source}); {flops:.3g} FLOPs a step"
            self.report.add("mfu", name, value, line)

    def captions(self) -> None:
        """Greedy and beam search against `generate`."""
        if not self.torch_device:
            raise RuntimeError(f"skipped: no PyTorch for {jax.default_backend()} devices")
        lm = self.size.model.llm.clone(dtype=self.dtype)
        pair = torch_generate.decoders(lm, self.torch_device)
        for beams, batch in self.size.captions:
            name = f"{'greedy' if beams == 1 else f'beam {beams}'}, batch {batch}"
            try:
                row = torch_generate.compare(
                    pair, lm, beams=beams, batch=batch, new_tokens=self.size.new_tokens, rounds=2 * self.size.rounds
                )
            except Exception as error:  # out of memory at one batch size: go on with the others
                self.report.fail("captions", name, error)
                continue
            near = abs(row["log_probability"] - row["their_log_probability"]) < 0.25
            row["agrees"] = near and (beams > 1 or row["their_worst_token"] < 0.25)
            self.report.add(
                "captions", name, row,
                f"{row['tokens_per_second']:.0f} tokens/s, generate {row['theirs']:.0f} ({row['ratio']:.2f} x); "
                f"{'agrees' if row['agrees'] else 'DIFFERS'}: {100 * row['same_ids']:.1f} % same ids, log-probability "
                f"{row['log_probability']:.3f} and {row['their_log_probability']:.3f}",
            )  # fmt: skip

    def memory_use(self) -> None:
        """Peak memory of the training step as counted by the frameworks, and XLA's estimate."""
        account = self.ours.compiled.memory_analysis()
        xla = {name: int(getattr(account, f"{name}_size_in_bytes")) for name in ("argument", "temp", "output", "alias")}
        self.memory.setdefault("ours", {"peak_bytes": None})
        for name, value in self.memory.items():
            value |= {f"xla_{part}_bytes": size for part, size in xla.items()} if name == "ours" else {}
            peak = value["peak_bytes"]
            line = "not counted here" if peak is None else f"{peak / 2**30:.2f} GiB"
            if name == "ours":
                line += f"; XLA: {xla['argument'] / 2**30:.3f} GiB of arguments, {xla['temp'] / 2**30:.3f} GiB of temporaries"
            self.report.add("memory", name, value, line)

    def profile(self) -> None:
        """The slowest operations of the training step; XLA's cost analysis if no trace can be read."""
        with tempfile.TemporaryDirectory() as folder:
            self.ours.step()
            with jax.profiler.trace(folder):
                for _ in range(PROFILED):
                    self.ours.step()
            try:
                found = profile_summary.summary(Path(folder), self.ours.compiled.as_text() or "", PROFILED)
            except (ValueError, AttributeError) as error:  # the trace is empty, or this JAX version cannot read it
                self.report.fail("profile", "trace", error)
                costs = self.ours.compiled.cost_analysis() or {}
                costs = {name: float(costs[name]) for name in ("flops", "bytes accessed") if name in costs}
                self.report.add("profile", "XLA's cost analysis", costs, f"{costs} (a scanned layer counts once)")
                return
        shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in found["kinds"].items())
        self.report.add("profile", "step", found, f"{found['busy_milliseconds']:.1f} ms busy a step: {shares}")
        for one in found["top"]:
            print(f"{'':<18}{one['milliseconds']:8.2f} ms {100 * one['share']:4.1f} % {one['times']:5.0f} x  "
                  f"{one['place'] or one['kernel'] or one['operation']}"[:150], flush=True)  # fmt: skip


def facts_of(arguments: argparse.Namespace, work: Bench) -> dict[str, Any]:
    """Versions, device and settings that the figures depend on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "cpu_cores": os.cpu_count(),
        "torch_device": torch.cuda.get_device_name() if work.torch_device == "cuda" else work.torch_device,
        "size": arguments.size,
        "dtype": work.dtype,
        "batch_size": work.size.batch,
        "conditions": "same weights and batch on all sides; frozen decoder in `dtype`, trained parameters float32; PyTorch under "
        "autocast where `dtype` is bfloat16; no dropout; remat none on all sides; PyTorch eager and compiled with fused "
        "attention and logits at text positions only, 'classes' without; warm-up excluded; timed in one order of the sides, "
        "then in the reverse order",
        "python": platform.python_version(),
        "versions": {
            name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
        },
    }


def main(argv: list[str] | None = None, began: float = BEGAN) -> dict[str, Any]:
    """Run the command line `argv`; return the content of the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("device.json"), help="JSON file to write")
    parser.add_argument("--size", choices=sorted(SIZES), default="1.3b")
    parser.add_argument(
        "--steps", default=",".join(BUDGETS), help="comma-separated steps to run (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16, on a CPU float32")
    parser.add_argument("--batch", type=int, help="batch size of a training step")
    parser.add_argument("--no_compile", action="store_true", help="skip torch.compile, which needs a C++ compiler")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        help="time limit of the whole command in seconds; each step gets a share (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    steps = [step.strip() for step in arguments.steps.split(",")]
    if unknown := [step for step in steps if step not in BUDGETS]:
        parser.error(f"--steps: unknown step {unknown[0]!r}; choose one of {', '.join(BUDGETS)}")
    if not arguments.limit > 0:
        parser.error(f"--limit {arguments.limit}: give more than 0 seconds")
    if arguments.batch is not None and arguments.batch < 1:
        parser.error(f"--batch {arguments.batch}: too small; give 1 or more")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out, arguments.limit, began)
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    size = SIZES[arguments.size]._replace(**{"batch": arguments.batch} if arguments.batch else {})
    work = Bench(size, dtype, report)
    report.put(command=["benchmarks.device", *(sys.argv[1:] if argv is None else argv)], finished=False)
    report.put(**facts_of(arguments, work))
    print(f"{report.result['device']} ({report.result['platform']}), size {arguments.size}, {dtype}", flush=True)
    runs = {
        "attention": work.attention, "build": work.build, "train": work.train, "compiled": work.compiled_step,
        "mfu": work.mfu, "captions": work.captions, "memory": work.memory_use, "profile": work.profile,
    }  # fmt: skip
    if arguments.no_compile:
        runs.pop("compiled")
    with report.watch():
        for step, run in runs.items():
            if step in steps or (step == "build" and NEED_BUILD & set(steps)):
                report.run(step, BUDGETS[step] * arguments.limit / LIMIT, run)
                gc.collect()
                if work.torch_device == "cuda":
                    torch.cuda.empty_cache()
    failed = [
        f"{step}/{name}"
        for step, part in report.result["steps"].items()
        for name, value in part.get("results", {}).items()
        if "error" in value or not value.get("agrees", True) or not value.get("same_losses", True)
    ]
    report.put(finished=True, failed=failed)
    print(
        f"{report.elapsed():.0f} s in all; {arguments.out}" + (f"; FAILED: {', '.join(failed)}" if failed else ""),
        flush=True,
    )
    return report.result


if __name__ == "__main__":
    code = 1 if main()["failed"] else 0
    sys.stdout.flush()
    os._exit(code)  # a step that was interrupted in native code may crash the interpreter's shutdown
