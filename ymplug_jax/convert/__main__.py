"""PyTorch checkpoints to Orbax and back: `python -m ymplug_jax.convert --model NAME --source FILE... --out DIR [--to torch]`.

    --model mplug_video   Youku-mPLUG's mp_rank_00_model_states.pt, any size, any task's heads
    --model alpro         ALPRO: Youku-mPLUG's classes, Salesforce's release, its prompter, its QA model
    --model gpt3          ModelScope's nlp_gpt3_text-generation_*: model/mp_rank_*_model_states.pt, all pieces, ordered by rank
    --model clip          CLIP, OpenAI's file or the Hugging Face layout: the spatial part of the video encoder
    --model vit           ViT of timm: the spatial part of the video encoder
    --model bloom         BLOOM and BLOOMZ in the Hugging Face layout, with or without LoRA adapters
    --model qwen          Qwen2, Qwen2.5 and Qwen3 (dense) in the Hugging Face layout, with the config.json beside the weights
    --model bert          BERT in the Hugging Face layout: text and fusion encoder of the baselines

A source is one or more files, an index of shards, or a folder that holds one model.
With --to torch a decoder's config.json is written beside the weights; its tokenizer is copied by hand.
What comes out is read by `--config.train.init_from=DIR`, whole or by subtree (`llm=DIR,vision=DIR`).
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NoReturn

from ymplug_jax.convert.plan import MODELS
from ymplug_jax.core import checkpoint_files, exits

EXTRA = ("torch", "safetensors")  # what the extra `convert` installs
HEADS = ("llm", "vision", "text")
TYPES = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the block of all flags before it."""
        self.exit(exits.MISTAKE, f"error: {message}; --help lists all flags\n")


def main(argv: list[str] | None = None) -> int:
    """Convert. Mistakes end in one line and exit code 2, a failed --check in 1, a place that fails on the way in 5."""
    args = _parsed(argv)
    try:
        return _run(args)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        print(f"error: {error.name} is not installed; pip install 'ymplug_jax[convert]'", file=sys.stderr)
    except exits.PlaceFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return exits.PLACE
    except (exits.Mistake, checkpoint_files.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
    return exits.MISTAKE


def _run(args: argparse.Namespace) -> int:
    # Here, so that a flag's mistake is told at once and a missing extra in one line.
    from ymplug_jax.convert.to_orbax import Wish, to_orbax
    from ymplug_jax.convert.to_torch import to_torch

    if args.to == "torch":
        for file in to_torch(args.model, args.source[0], args.out, args.layout):
            print(file)
        return 0
    if args.check:
        from ymplug_jax.convert.check import check
    wish = Wish(
        heads=dict(map(_heads, args.heads)),
        dtype=dict(map(_dtype, args.dtype)),
        image_size=args.image_size,
        frames=args.frames,
        adapter=args.lora,
        keep_adapter=args.keep_lora,
        allow_missing=args.allow_missing,
        allow_unexpected=args.allow_unexpected,
    )
    if not (args.check and (args.out / "checkpoints" / "converted").exists()):
        print(to_orbax(args.model, args.source, args.out, wish))
    return 0 if not args.check or check(args.model, args.source, args.out, wish) else 1


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    """The flags; a mistake in them ends the program with one line."""
    parser = _Parser(
        prog="python -m ymplug_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument(
        "--source",
        type=Path,
        nargs="+",
        required=True,
        help="files, or a folder that holds one model; with --to torch a run or a converted folder",
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", choices=["orbax", "torch"], default="orbax")
    parser.add_argument(
        "--check", action="store_true", help="compare with PyTorch, module by module (needs transformers)"
    )
    parser.add_argument("--dtype", nargs="*", default=[], metavar="SUBTREE=TYPE", help="e.g. frozen=bfloat16")
    parser.add_argument("--image_size", type=_count, help="resize the table of positions, in pixels of the video")
    parser.add_argument("--frames", type=_count, help="resize the table of times")
    parser.add_argument("--lora", type=Path, help="folder of an adapter that PEFT wrote, to be added to the weights")
    parser.add_argument("--keep_lora", action="store_true", help="store the adapter beside the weights instead")
    parser.add_argument(
        "--allow_missing", nargs="*", type=_regex, default=[], help="regexes of tensors that the source may lack"
    )
    parser.add_argument(
        "--allow_unexpected", nargs="*", type=_regex, default=[], help="regexes of tensors to leave out"
    )
    parser.add_argument(
        "--heads",
        nargs="*",
        metavar="NAME=N",
        default=[],
        help="heads of sizes we do not know: llm=N vision=N text=N",
    )
    parser.add_argument("--layout", help="with --to torch: names to write, e.g. openai; default: as they were read")
    args = parser.parse_args(argv)
    if ":/" in str(args.out):
        parser.error(f"--out {args.out}: give a local folder, and copy it when it is complete (gcloud storage cp -r)")
    if args.to == "torch":
        others = ("check", "dtype", "image_size", "frames", "lora", "keep_lora", "allow_missing", "allow_unexpected")
        if used := [name for name in others if getattr(args, name)]:
            parser.error(f"--{used[0]} belongs to the conversion to Orbax; leave it out with --to torch")
        if len(args.source) > 1:
            parser.error("--source: with --to torch give one folder, of a run or of a conversion")
    elif args.layout:
        parser.error(f"--layout {args.layout}: the names of a source are found out; give it with --to torch only")
    if args.keep_lora and not args.lora:
        parser.error("--keep_lora: give the folder of the adapter too: --lora DIR")
    if args.check and (args.image_size or args.frames or args.allow_missing):
        parser.error("--check compares whole models: convert without --image_size, --frames and --allow_missing")
    return args


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number above 0")
    return int(text)


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None
    return text


def _heads(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if name not in HEADS or not re.fullmatch(r"0*[1-9][0-9]*", count):
        raise exits.Mistake(f"--heads {text}: write NAME=NUMBER with one of {', '.join(HEADS)}, e.g. llm=32")
    return name, int(count)


def _dtype(text: str) -> tuple[str, str]:
    subtree, _, name = text.rpartition("=")
    if not subtree or name not in TYPES:
        raise exits.Mistake(f"--dtype {text}: write SUBTREE=TYPE with one of {', '.join(TYPES)}, e.g. frozen=bfloat16")
    return subtree, name


if __name__ == "__main__":
    sys.exit(main())
