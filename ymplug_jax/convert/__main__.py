"""PyTorch checkpoints to Orbax and back: `python -m ymplug_jax.convert --model NAME --source FILE... --out DIR [--to torch]`.

    --model mplug_video   Youku-mPLUG's mp_rank_00_model_states.pt, any size, any task's heads
    --model alpro         ALPRO: Youku-mPLUG's classes, Salesforce's release, its prompter, its QA model
    --model gpt3          ModelScope's nlp_gpt3_text-generation_*: model/mp_rank_*_model_states.pt, 1 or more pieces
    --model clip          CLIP, OpenAI's file or the Hugging Face layout: the spatial part of the video encoder
    --model vit           ViT of timm: the spatial part of the video encoder
    --model bloom         BLOOM and BLOOMZ in the Hugging Face layout, with or without LoRA adapters
    --model bert          BERT in the Hugging Face layout: text and fusion encoder of the baselines

What comes out is read by `--config.train.init_from=DIR`, whole or by subtree (`llm=DIR,vision=DIR`).
"""

import argparse
import sys
from pathlib import Path

from ymplug_jax import checkpoint
from ymplug_jax.convert.plan import MODELS, UnknownModel
from ymplug_jax.convert.to_orbax import Wish, to_orbax
from ymplug_jax.convert.to_torch import to_torch
from ymplug_jax.convert.torch_file import SourceError


def main(argv: list[str] | None = None) -> int:
    """Convert. Mistakes end in one line and exit code 2; a failed --check in exit code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m ymplug_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument(
        "--source", type=Path, nargs="+", required=True, help="files; with --to torch a run or a converted folder"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", choices=["orbax", "torch"], default="orbax")
    parser.add_argument(
        "--check", action="store_true", help="compare with PyTorch, module by module (needs transformers)"
    )
    parser.add_argument("--dtype", nargs="*", default=[], metavar="SUBTREE=TYPE", help="e.g. frozen=bfloat16")
    parser.add_argument("--image_size", type=int, help="resize the table of positions, in pixels of the video")
    parser.add_argument("--frames", type=int, help="resize the table of times")
    parser.add_argument("--lora", type=Path, help="folder of an adapter that PEFT wrote, to be added to the weights")
    parser.add_argument("--keep_lora", action="store_true", help="store the adapter beside the weights instead")
    parser.add_argument("--allow_missing", nargs="*", default=[], help="regexes of tensors that the source may lack")
    parser.add_argument("--allow_unexpected", nargs="*", default=[], help="regexes of tensors to leave out")
    parser.add_argument("--heads", nargs="*", default=[], help="heads of sizes we do not know: llm=N vision=N text=N")
    parser.add_argument("--layout", help="with --to torch: names to write, e.g. openai; default: as they were read")
    args = parser.parse_args(argv)
    if ":/" in str(args.out):
        parser.error(f"--out {args.out}: give a local folder, and copy it when it is complete (gcloud storage cp -r)")
    try:
        if args.to == "torch":
            for file in to_torch(args.model, args.source[0], args.out, args.layout):
                print(file)
            return 0
        wish = Wish(
            heads={name: int(count) for name, count in _pairs("--heads", args.heads, int)},
            dtype=dict(_pairs("--dtype", args.dtype, _float_type)),
            image_size=args.image_size,
            frames=args.frames,
            adapter=args.lora,
            keep_adapter=args.keep_lora,
            allow_missing=args.allow_missing,
            allow_unexpected=args.allow_unexpected,
        )
        if not (args.check and (args.out / "checkpoints" / "converted").exists()):
            print(to_orbax(args.model, args.source, args.out, wish))
        if args.check:
            from ymplug_jax.convert.check import check

            return 0 if check(args.model, args.source, args.out, wish) else 1
    except (SourceError, UnknownModel, FileExistsError, checkpoint.CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _pairs(flag: str, given: list[str], valid) -> list[tuple[str, str]]:
    pairs = [tuple(part.split("=", 1)) for part in given]
    for pair in pairs:
        try:
            valid(pair[1])
        except (IndexError, ValueError):
            raise SourceError(f"{flag} {'='.join(pair)}: write NAME=VALUE, e.g. llm=32 or frozen=bfloat16") from None
    return pairs


def _float_type(name: str) -> str:
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(name)
    return name


if __name__ == "__main__":
    sys.exit(main())
