"""Converting: peak memory and speed on a checkpoint of BLOOM-7B1's shape, and forward passes at full size against PyTorch.

    python -m benchmarks.convert [--folder DIR] [--only memory|check]

`memory` writes shards of random bfloat16 values (14 GB), copies them with cp, converts them, and prints the peak resident memory
beside its limit, three times the largest tensor plus 1 GB. `check` writes models of released sizes with random weights, converts
them with --check, converts them back and compares every tensor bit by bit.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import torch_sources

BLOOM_7B = {"width": 4096, "depth": 30, "vocab": 250880}
FULL = {
    "gpt3 1.3b": ("gpt3", "megatron", {"width": 2048, "depth": 24, "vocab": 51200, "positions": 2048}, torch.bfloat16),
    "bloom 1b7": ("bloom", "bloom", {"width": 2048, "depth": 24, "heads": 16, "vocab": 250880}, torch.float16),
    "clip l/14": ("clip", "clip", {"width": 1024, "depth": 24, "heads": 16, "patch": 14, "image": 224}, torch.float32),
    "clip b/16": ("clip", "openai", {"width": 768, "depth": 12, "heads": 12, "patch": 16, "image": 224}, torch.float16),
    "vit b/16": ("vit", "timm", {"width": 768, "depth": 12, "heads": 12, "patch": 16, "image": 224}, torch.float32),
    "bert base": ("bert", "bert", {"width": 768, "depth": 12, "heads": 12, "vocab": 21128}, torch.float32),
}


def main() -> None:
    """Run and print one JSON line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "convert")
    parser.add_argument("--only", choices=["memory", "check"])
    args = parser.parse_args()
    if args.only != "check":
        print(json.dumps(memory(args.folder / "memory")), flush=True)
    if args.only != "memory":
        for name, (model, writer, sizes, dtype) in FULL.items():
            print(
                json.dumps({"model": name} | full_size(args.folder / "check", model, writer, sizes, dtype)), flush=True
            )


def memory(folder: Path) -> dict:
    """Copy and convert 14 GB; return speed and memory of both."""
    shutil.rmtree(folder, ignore_errors=True)
    index, total, largest = _bloom_7b(folder / "source")
    os.sync()
    copying, converting = [], []
    for round_ in range(2):  # alternately, each twice
        begin = time.perf_counter()
        subprocess.run(["cp", "-r", folder / "source", folder / "copy"], check=True)
        os.sync()
        copying.append(time.perf_counter() - begin)
        shutil.rmtree(folder / "copy")
        seconds, peak = _child("--model", "bloom", "--source", str(index), "--out", str(folder / f"out{round_}"))
        converting.append(seconds)
        shutil.rmtree(folder / f"out{round_}")
    shutil.rmtree(folder)
    return {
        "gigabytes": round(total / 1e9, 2),
        "largest_tensor_gb": round(largest / 1e9, 2),
        "peak_gb": round(peak / 1e9, 2),
        "bound_gb": round((3 * largest + 1e9) / 1e9, 2),
        "cp_gb_per_s": [round(total / 1e9 / seconds, 2) for seconds in copying],
        "convert_gb_per_s": [round(total / 1e9 / seconds, 2) for seconds in converting],
    }


def _bloom_7b(folder: Path) -> tuple[Path, int, int]:
    """Write one shard per layer and the index, with random finite bfloat16 values."""
    folder.mkdir(parents=True)
    width = BLOOM_7B["width"]
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> torch.Tensor:
        bits = np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16) & np.uint16(0xBFFF)
        return torch.from_numpy(bits.view(np.int16).reshape(shape)).view(torch.bfloat16)

    def norm(name: str) -> dict:
        return {f"{name}.weight": draw(width), f"{name}.bias": draw(width)}

    where, total, largest = {}, 0, 0
    for i in range(BLOOM_7B["depth"] + 1):
        if i == BLOOM_7B["depth"]:
            tensors = {"word_embeddings.weight": draw(BLOOM_7B["vocab"], width)}
            tensors |= norm("word_embeddings_layernorm") | norm("ln_f")
        else:
            tensors = norm(f"h.{i}.input_layernorm") | norm(f"h.{i}.post_attention_layernorm")
            for part, out, inner in (
                ("self_attention.query_key_value", 3 * width, width),
                ("self_attention.dense", width, width),
                ("mlp.dense_h_to_4h", 4 * width, width),
                ("mlp.dense_4h_to_h", width, 4 * width),
            ):
                tensors |= {f"h.{i}.{part}.weight": draw(out, inner), f"h.{i}.{part}.bias": draw(out)}
        file = f"model-{i + 1:05d}.safetensors"
        save_file(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
        total += sum(t.nbytes for t in tensors.values())
        largest = max(largest, *(t.nbytes for t in tensors.values()))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    return index, total, largest


def _child(*argv: str) -> tuple[float, int]:
    """(seconds, peak resident memory in bytes) of one conversion in a separate process."""
    begin = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", "ymplug_jax.convert", *argv], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"convert {' '.join(argv)} failed")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024


def full_size(folder: Path, model: str, writer: str, sizes: dict, dtype: torch.dtype) -> dict:
    """Convert one model with random weights, check it, and convert it back."""
    shutil.rmtree(folder, ignore_errors=True)
    files = getattr(torch_sources, writer)(folder / "source", dtype=dtype, **sizes)
    heads = ["--heads", f"vision={sizes['heads']}"] if "patch" in sizes else []
    command = [sys.executable, "-m", "ymplug_jax.convert", "--model", model, *heads]
    source = ["--source", *map(str, files), "--out", str(folder / "out"), "--check"]
    done = subprocess.run([*command, *source], check=True, capture_output=True, text=True)
    subprocess.run([*command, "--source", folder / "out", "--out", folder / "back", "--to", "torch"], check=True)
    counts = _compare(files[0], folder / "back" / "model.safetensors", model)
    shutil.rmtree(folder)
    return {"check": done.stdout.splitlines()[-1], **counts}


def _compare(source: Path, back: Path, model: str) -> dict:
    """Count tensors that return bit-identical, with zeros for key biases, or different (by name)."""
    from ymplug_jax.convert.plan import extra, map_of
    from ymplug_jax.convert.torch_file import Source

    there, equal, zeros, other = Source([source], rename=extra(map_of(model), "RENAME", ())), 0, 0, []
    with safe_open(str(back), framework="pt") as tensors:
        for name in tensors.keys():
            mine = tensors.get_tensor(name).contiguous().view(-1)
            theirs = torch.from_numpy(np.ascontiguousarray(there.read(name)).reshape(-1).view(np.uint8).copy())
            theirs = theirs.view(mine.dtype)
            same = mine.view(torch.uint8) == theirs.view(torch.uint8)
            if same.all():
                equal += 1
            elif name.endswith("bias") and not mine[(mine != theirs)].any():
                zeros += 1
            else:
                other.append(name)
    return {"equal": equal, "key_bias_zeroed": zeros, "other": other}


if __name__ == "__main__":
    main()
