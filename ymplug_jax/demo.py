"""The whole path on a laptop: `python -m ymplug_jax.demo --out runs/demo` (what `make demo` runs).

Draws real mp4 files with Chinese titles, trains a tokenizer, builds shards, trains a tiny language model on the titles,
freezes it, pre-trains a tiny mPLUG-video through it, and reports what it says about clips it has never seen. Every step is
a command of the README, printed before it runs; a second call goes on where the first one stopped.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from ymplug_jax.writer import read_metrics

ROOT = Path(__file__).parent.parent


def steps(out: Path, clips: int) -> list[tuple[str, list[str]]]:
    """(title, command after `python -m`) of every step."""
    corpus, shards, tokenizer = out / "corpus", out / "shards", out / "titles.model"

    def build(split: str) -> list[str]:
        csv = corpus / f"pretrain_{split}.csv"
        return [
            "data_prep.build_shards",
            "--config=pretrain",
            f"--csv={csv}",
            f"--video_root={corpus}",
            f"--out={shards}",
        ]

    def main(config: str, data: Path, *more: str) -> list[str]:
        settings = [f"--config.data.path={data}", f"--config.data.tokenizer={tokenizer}"]
        return ["ymplug_jax.main", f"--config=configs/tiny/{config}.py", f"--workdir={out / config}", *settings, *more]

    # Titles of this corpus have at most 8 tokens; the default leaves room for real ones.
    pretrain = [f"--config.train.init_from=llm={out / 'language'}", "--config.data.max_tokens=8"]
    return [
        ("draw the videos", ["data_prep.draw_shapes", f"--out={corpus}", f"--clips={clips}"]),
        (
            "train a tokenizer on the titles",
            ["data_prep.train_tokenizer", f"--csv={corpus / 'pretrain_train.csv'}", f"--out={tokenizer}"],
        ),
        ("build the training shards", build("train")),
        ("build the validation shards", build("val")),
        ("train a tiny language model on the titles alone", main("language", corpus / "titles.txt")),
        ("freeze it and pre-train mPLUG-video", main("pretrain", shards, *pretrain)),
        ("write titles for the validation clips", main("pretrain", shards, *pretrain, "--mode=eval")),
    ]


def report(out: Path) -> str:
    """What was learned, from the files that the steps left."""
    evals = [line for line in read_metrics(out / "pretrain") if "eval/loss" in line]
    folder = out / "pretrain" / "eval" / "validation"
    scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    shown = "\n".join(
        f"  {'right' if r['title'] == r['generated'] else 'WRONG'}  {r['title']}  ->  {r['generated']}"
        for r in rows[:12]
    )
    return (
        f"Validation loss {evals[0]['eval/loss']:.3f} before pre-training (step {evals[0]['step']}), "
        f"{evals[-1]['eval/loss']:.3f} after (step {evals[-1]['step']}).\n"
        f"Titles of clips whose shape, colour and motion were never seen together (true -> generated):\n{shown}\n"
        f"{scores['exact_titles']:.0f} of {scores['examples']} validation titles are right to the last character "
        f"({100 * scores['exact_share']:.0f} %), with a frozen language model.\n"
        f"Loss curve: {out / 'pretrain' / 'loss.png'}"
    )


def main() -> int:
    """Run every step, then print the report. Returns the exit code of the first step that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything the demo makes")
    parser.add_argument("--clips", type=int, default=2400, help="videos to draw")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    plan = steps(out, args.clips)
    begin = time.perf_counter()
    for number, (title, command) in enumerate(plan, 1):
        print(f"\n== {number}/{len(plan)} {title}\n$ python -m {' '.join(command)}", flush=True)
        started = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
        if code:
            print(f"this step failed with exit code {code}; its message stands above", file=sys.stderr)
            return code
        print(f"   {time.perf_counter() - started:.0f} s", flush=True)
    print(f"\n== report ({time.perf_counter() - begin:.0f} s in all)\n{report(out)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
