"""Convert PyTorch checkpoints to Orbax and back: `python -m ymplug_jax.convert --model NAME --source FILE... --out DIR [--to torch]`.

    --model mplug_video   Youku-mPLUG's mp_rank_00_model_states.pt, any size, with the heads of any task
    --model alpro         ALPRO: Youku-mPLUG's checkpoints, and Salesforce's release, prompter and QA model
    --model gpt3          ModelScope's nlp_gpt3_text-generation_*: all tensor-parallel pieces model/mp_rank_*_model_states.pt
    --model clip          CLIP, OpenAI's file or the Hugging Face layout: initialises the spatial part of the video encoder
    --model clip_chat     the same files: initialises the vision tower of the chat model
    --model clip_mplug2   the same files: initialises the vision tower of an mPLUG-2 of variant mplug2
    --model vit           ViT of timm: initialises the spatial part of the video encoder
    --model bloom         BLOOM and BLOOMZ in the Hugging Face layout, with or without LoRA adapters
    --model qwen          Qwen2, Qwen2.5 and Qwen3 (dense) in the Hugging Face layout; needs the model's config.json
    --model mplug2        mPLUG-2: the released files with CLIP's tower, and the classes of Youku-mPLUG with a TimeSformer
    --model mplug_chat    the released chat model: vision tower with adapters, abstractor and BLOOMZ in one file or shards
    --model bert_mplug2   the same BERT: text encoder, fusion encoder, decoder and masked-word head of a new mPLUG-2
    --model bert          BERT in the Hugging Face layout: text and fusion encoder of ALPRO

The source is one or more files, an index of shards, or a folder that holds one model.
`--config.train.init_from=DIR` initialises a run from a conversion, whole or by subtree (`llm=DIR,vision=DIR`).
`--to torch` writes safetensors, and config.json for a language model. Copy the tokenizer yourself.
Repeating an interrupted command continues the conversion.
"""

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from etils import epath

from ymplug_jax.convert.plan import MODELS
from ymplug_jax.core import checkpoint_files, exits, place_copies, places

EXTRA = ("torch", "safetensors")  # what the extra `convert` installs
HEADS = ("llm", "vision", "text", "abstractor", "fusion", "universal")
# With --to torch there is no journal: an interrupted conversion removes its files.
STOPPED = {
    "orbax": "stopped; run the same command again to continue",
    "torch": "stopped; no file was written, run the same command again to start over",
}
LAST = ("config.json", "_CHECKPOINT_METADATA", "_METADATA", "model.safetensors.index.json")  # readers need them
TYPES = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line without the usage text, and exit."""
        self.exit(exits.MISTAKE, f"error: {message}; --help lists the flags\n")


def main(argv: list[str] | None = None) -> int:
    """Run the command. Errors and Ctrl-C print one line.

    Returns:
      The exit code: 0, 1 for a failed --check, or MISTAKE, PLACE or STOPPED of `exits`.
    """
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
    except KeyboardInterrupt:
        print(STOPPED[args.to], file=sys.stderr)
        return exits.STOPPED
    return exits.MISTAKE


def _run(args: argparse.Namespace) -> int:
    # Imported here, so that a wrong flag is reported without loading torch and a missing extra is one line.
    with contextlib.ExitStack() as stack:
        args.source = _local_sources(args.source, stack)
        args.lora = args.lora and stack.enter_context(place_copies.local_folder(args.lora, "--lora"))
        if not places.is_remote(args.out):
            return _convert(args, str(args.out))
        out = args.out
        with place_copies.failing():
            places.check_bucket(out)
            for name in ("checkpoints/converted/_METADATA", "model.safetensors", "model.safetensors.index.json", ""):
                if places.stamp(out / name if name else out):
                    raise exits.Mistake(
                        f"--out {out}: {name or 'a file'} exists there; remove it or choose another folder"
                    )
        with place_copies.working_folder(out) as folder:
            args.out = folder / out.name
            folder.mkdir(exist_ok=True)
            code = _convert(args, str(out))
            place_copies.upload_folder(folder, out.parent, LAST)
        return code


def _local_sources(sources: Sequence[Path | epath.Path], stack: contextlib.ExitStack) -> list[Path]:
    """Copy sources in buckets to temporary folders, files of one folder to one folder, as tensor-parallel pieces are looked up together."""
    if not any(places.is_remote(source) for source in sources):
        return [Path(source) for source in sources]
    if len(sources) == 1:
        return [stack.enter_context(place_copies.local_folder(sources[0], "--source"))]
    root, found = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ymplug_jax_"))), []
    parents = list(dict.fromkeys(str(source.parent) for source in sources))
    for source in sources:
        copy = root / str(parents.index(str(source.parent))) / source.name
        copy.parent.mkdir(exist_ok=True)
        try:
            with place_copies.failing():
                places.download(source, copy)
        except FileNotFoundError:
            raise exits.Mistake(f"--source {source}: no such file; correct the path") from None
        found.append(copy)
    return found


def _convert(args: argparse.Namespace, shown: str) -> int:
    """Convert between local places. `shown` is printed instead of the folder `args.out`."""
    from ymplug_jax.convert.to_orbax import Wish, to_orbax
    from ymplug_jax.convert.to_torch import to_torch

    if args.to == "torch":
        for file in to_torch(args.model, args.source[0], args.out, args.layout, args.merge_lora):
            print(str(file).replace(str(args.out), shown, 1))
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
        print(str(to_orbax(args.model, args.source, args.out, wish)).replace(str(args.out), shown, 1))
    return 0 if not args.check or check(args.model, args.source, args.out, wish) else 1


def _parsed(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags. A wrong flag exits with one line and code 2."""
    parser = _Parser(
        prog="python -m ymplug_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, required=True, help="model of the source, see above")
    parser.add_argument(
        "--source",
        type=place_copies.any_place,
        nargs="+",
        required=True,
        help="files, or a folder that holds one model; with --to torch the folder of a run or of a conversion",
    )
    parser.add_argument(
        "--out",
        type=place_copies.any_place,
        required=True,
        help="output folder, local or gs://; created if it is missing",
    )
    parser.add_argument("--to", choices=["orbax", "torch"], default="orbax", help="format to write (default: orbax)")
    parser.add_argument(
        "--check", action="store_true", help="compare each module's output with PyTorch's (needs transformers)"
    )
    parser.add_argument(
        "--dtype", nargs="*", default=[], metavar="SUBTREE=TYPE", help="cast a subtree, e.g. frozen=bfloat16"
    )
    parser.add_argument(
        "--image_size", type=_count, help="resize the positional embeddings to frames of this size, in pixels"
    )
    parser.add_argument("--frames", type=_count, help="resize the temporal embeddings to this number of frames")
    parser.add_argument(
        "--lora", type=place_copies.any_place, help="folder of a PEFT adapter to merge into the weights"
    )
    parser.add_argument("--keep_lora", action="store_true", help="store the adapter separately instead of merging it")
    parser.add_argument(
        "--allow_missing", nargs="*", type=_regex, default=[], help="regexes of tensors that the source may lack"
    )
    parser.add_argument(
        "--allow_unexpected", nargs="*", type=_regex, default=[], help="regexes of source tensors to ignore"
    )
    parser.add_argument(
        "--heads",
        nargs="*",
        metavar="NAME=N",
        default=[],
        help="attention heads, for models of unknown size: llm=N vision=N text=N abstractor=N; for mPLUG-2 also fusion=N and "
        "universal=N, numbers of layers",
    )
    parser.add_argument(
        "--layout",
        help="with --to torch: naming scheme to write, e.g. openai, or peft for the adapters; default: the source's",
    )
    parser.add_argument("--merge_lora", action="store_true", help="with --to torch: add the adapters to the weights")
    args = parser.parse_args(argv)
    if args.to == "torch":
        others = ("check", "dtype", "image_size", "frames", "lora", "keep_lora", "allow_missing", "allow_unexpected")
        if used := [name for name in others if getattr(args, name)]:
            parser.error(f"--{used[0]}: does not apply to --to torch; leave it out")
        if len(args.source) > 1:
            parser.error("--source: --to torch takes one folder; give that of a run or of a conversion")
        if args.merge_lora and args.layout == "peft":
            parser.error("--merge_lora: the layout peft holds adapters without weights; leave out one of the two")
    elif args.merge_lora:
        parser.error(
            "--merge_lora: applies to --to torch only; an adapter of --lora is merged without it; leave it out"
        )
    elif args.layout:
        parser.error(f"--layout {args.layout}: applies to --to torch only, a source's layout is detected; leave it out")
    if args.keep_lora and not args.lora:
        parser.error("--keep_lora: there is no adapter to keep; give its folder with --lora DIR")
    if args.check and (args.image_size or args.frames or args.allow_missing):
        parser.error("--check: compares unchanged models only; leave out --image_size, --frames and --allow_missing")
    return args


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0; give an integer such as 8")
    return int(text)


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular expression ({error}); correct the pattern"
        ) from None
    return text


def _heads(text: str) -> tuple[str, int]:
    name, _, count = text.partition("=")
    if name not in HEADS or not re.fullmatch(r"0*[1-9][0-9]*", count):
        raise exits.Mistake(f"--heads {text}: not NAME=NUMBER; choose one of {', '.join(HEADS)}, e.g. llm=32")
    return name, int(count)


def _dtype(text: str) -> tuple[str, str]:
    subtree, _, name = text.rpartition("=")
    if not subtree or name not in TYPES:
        raise exits.Mistake(f"--dtype {text}: not SUBTREE=TYPE; choose one of {', '.join(TYPES)}, e.g. frozen=bfloat16")
    return subtree, name


if __name__ == "__main__":
    sys.exit(main())
