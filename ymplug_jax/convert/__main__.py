"""PyTorch checkpoints to Orbax and back: `python -m ymplug_jax.convert --model NAME --source FILE... --out DIR [--to torch]`.

    --model mplug_video   Youku-mPLUG's mp_rank_00_model_states.pt, any size, any task's heads
    --model gpt3          ModelScope's nlp_gpt3_text-generation_*: model/mp_rank_*_model_states.pt, 1 or more pieces
    --model clip          CLIP in the Hugging Face layout: the spatial part of the video encoder

What comes out is read by `--config.train.init_from=DIR`, whole or by subtree (`llm=DIR,vision=DIR`).
"""

import argparse
import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict
from tqdm import tqdm

import ymplug_jax
from ymplug_jax import checkpoint, state
from ymplug_jax.convert import rules
from ymplug_jax.convert.plan import Plan, UnknownModel
from ymplug_jax.convert.store import Store
from ymplug_jax.convert.torch_file import Source, SourceError

MODELS = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("__init__", "__main__", "rules", "plan", "store", "torch_file")
)


def main(argv: list[str] | None = None) -> int:
    """Convert. Mistakes end in one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m ymplug_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument(
        "--source", type=Path, nargs="+", required=True, help="files; with --to torch a run or a converted folder"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", choices=["orbax", "torch"], default="orbax")
    parser.add_argument("--allow_missing", nargs="*", default=[], help="regexes of tensors that the source may lack")
    parser.add_argument("--allow_unexpected", nargs="*", default=[], help="regexes of tensors to leave out")
    parser.add_argument(
        "--heads", nargs="*", default=[], help="attention heads of sizes we do not know: llm=N vision=N"
    )
    args = parser.parse_args(argv)
    try:
        heads = {name: int(count) for name, count in (pair.split("=") for pair in args.heads)}
        if args.to == "torch":
            to_torch(args.model, args.source, args.out)
        else:
            to_orbax(args.model, args.source, args.out, heads, args.allow_missing, args.allow_unexpected)
    except (SourceError, UnknownModel, FileExistsError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def to_orbax(
    model: str,
    files: list[Path],
    out: Path,
    heads: Mapping[str, int],
    allow_missing: list[str] = (),
    allow_unexpected: list[str] = (),
) -> dict:
    """Convert one model, tensor by tensor; returns the record that is kept in conversion.json.

    Raises:
      SourceError, UnknownModel, FileExistsError: see there; also tensors that are missing, unexpected or of another shape.
    """
    module = importlib.import_module(f"ymplug_jax.convert.{model}")
    source = Source(files, getattr(module, "MERGE", None))
    shapes = source.shapes()
    plan: Plan = module.plan(shapes, heads)
    entries = rules.expand(plan.rules, plan.like)
    dropped = [name for name in shapes if name not in entries and _any(name, plan.drop)]
    mismatch = rules.compare(entries, {name: shape for name, shape in shapes.items() if name not in dropped})
    bad = {
        "missing": [name for name in mismatch.missing if not _any(name, allow_missing)],
        "unexpected": [name for name in mismatch.unexpected if not _any(name, allow_unexpected)],
        "reshaped": mismatch.reshaped,
    }
    taken = [name for name in entries if name in shapes]
    print(
        f"{len(taken)} tensors matched, {len(mismatch.missing)} missing, {len(mismatch.unexpected)} unexpected, "
        f"{len(mismatch.reshaped)} of another shape, {len(dropped)} known and not wanted",
        file=sys.stderr,
    )
    if any(bad.values()):
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in bad.items() if names)
        raise SourceError(f"{files[0]} does not fit model {model}. {listed}. See --allow_missing, --allow_unexpected")
    facts = {
        "model": model,
        "converter": ymplug_jax.__version__,
        "sources": source.digests(),
        "dropped": dropped,
        "left_out": mismatch.unexpected,
        "missing": mismatch.missing,
    }
    whole = {path: tuple(leaf.shape) for path, leaf in flatten_dict(plan.like, sep="/").items()}
    store = Store(out, facts)
    total = sum(4 * int(np.prod(shapes[name])) for name in taken)
    written: set[str] = set()
    with tqdm(
        total=total / 2**30,
        unit="GB (as float32)",
        desc="convert",
        file=sys.stderr,
        bar_format="{l_bar}{bar}| {n:.2f}/{total:.2f} {unit} [{elapsed}<{remaining}]",
    ) as bar:
        for name in taken:
            if name not in store.done:
                for path, layer, value in rules.pieces(entries[name], source.read(name)):
                    store.write(path, layer, np.ascontiguousarray(value).reshape(value.shape), whole[path])
                store.wrote(name)
            written.update(entries[name].rule.targets)
            bar.update(4 * int(np.prod(shapes[name])) / 2**30)
    print(store.finish(sorted(written), facts))
    return facts


def to_torch(model: str, folders: list[Path], out: Path) -> None:
    """Write a run's or a converted folder's parameters as safetensors under the names of the source.

    Raises:
      SourceError: no checkpoint there.
    """
    import jax
    import torch
    from safetensors.torch import save_file

    module = importlib.import_module(f"ymplug_jax.convert.{model}")
    table = module.TABLE
    stored = checkpoint.stored_params(str(folders[0]))
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    wanted = {path for rule in table for path in rule.targets} & set(stored)
    if not wanted:
        raise SourceError(f"{folders[0]}: none of its parameters belong to model {model}")
    abstract = {
        path: jax.ShapeDtypeStruct(tuple(stored[path].shape), stored[path].dtype, sharding=place)
        for path in sorted(wanted)
    }
    flat = checkpoint.load_params(str(folders[0]), state.unflatten(abstract))
    named = rules.to_torch(table, state.unflatten({path: np.asarray(leaf) for path, leaf in flat.items()}))
    out.parent.mkdir(parents=True, exist_ok=True)
    file = out if out.suffix == ".safetensors" else out / "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: _tensor(torch, np.ascontiguousarray(value).reshape(value.shape)) for name, value in named.items()}, file
    )
    print(file)


def _tensor(torch, value: np.ndarray):
    if value.dtype.name == "bfloat16":
        return torch.from_numpy(value.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(value)


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _any(name: str, patterns) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)


if __name__ == "__main__":
    sys.exit(main())
