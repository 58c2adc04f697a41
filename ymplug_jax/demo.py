"""The whole pipeline on a laptop: `python -m ymplug_jax.demo --out runs/demo` (`make demo`).

The demo draws mp4 files with Chinese titles, trains a tokenizer, builds shards, trains a tiny language model on text only, freezes it,
pre-trains a tiny mPLUG-video through it, fine-tunes the three benchmarks, and reports the results on unseen clips. Each step is an
ordinary command that is printed before it runs. Running the demo again resumes where it stopped.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from ymplug_jax.core import place_copies, text_files
from ymplug_jax.core.metrics import read_metrics

ROOT = Path(__file__).parent.parent
# Parts of a title written by data_prep.draw_shapes.
PARTS = {"colour": r"^(.*?)的", "shape": r"的(.*?)在", "motion": r"在(.*)$"}
LLMS = ("gpt3", "bloom", "qwen")  # arguments of configs/tiny
BENCHMARKS = {"classify": "classification", "caption": "captioning", "retrieve": "retrieval"}  # task -> kind of CSV


class Step(NamedTuple):
    """One command after `python -m`."""

    title: str
    command: list[str]


def steps(out: Path, clips: int, llm: str = "gpt3") -> list[Step]:
    """Steps of the demo, in order.

    Args:
      out: Folder for all outputs.
      clips: Number of videos to draw.
      llm: Kind of the tiny language model, one of `LLMS`.
    """
    corpus, tokenizer = out / "corpus", out / "titles.model"

    def build(kind: str) -> list[Step]:
        folder = out / "shards" / kind
        return [
            Step(
                f"build the {kind} shards ({split})",
                [
                    "data_prep.build_shards",
                    f"--config={kind}",
                    f"--csv={corpus / f'{kind}_{split}.csv'}",
                    f"--video_root={corpus}",
                    f"--out={folder}",
                ],
            )
            for split in ("train", "val")
        ]

    def main(config: str, data: Path, *more: str, workdir: str = "") -> list[str]:
        settings = [f"--config.data.path={data}", f"--config.data.tokenizer={tokenizer}"]
        folder = out / (workdir or config)
        return ["ymplug_jax.main", f"--config=configs/tiny/{config}.py:{llm}", f"--workdir={folder}", *settings, *more]

    def shards(kind: str) -> Path:
        return out / "shards" / kind

    # The titles of this corpus are short; the default leaves room for real titles.
    pretrain = [f"--config.train.init_from=llm={out / 'language'}", "--config.data.max_tokens=12"]
    plan = [
        Step("draw the videos", ["data_prep.draw_shapes", f"--out={corpus}", f"--clips={clips}"]),
        Step(
            "train a tokenizer on the texts",
            ["data_prep.train_tokenizer", f"--csv={corpus / 'texts.txt'}", f"--out={tokenizer}"],
        ),
        *build("pretrain"),
        Step("train a tiny language model on text only", main("language", corpus / "texts.txt")),
        Step("freeze it and pre-train mPLUG-video", main("pretrain", shards("pretrain"), *pretrain)),
        Step("write titles for the validation clips", main("pretrain", shards("pretrain"), *pretrain, "--mode=eval")),
    ]
    for task, kind in BENCHMARKS.items():
        more = [f"--config.train.init_from={out / 'pretrain'}"]
        plan += build(kind)
        plan.append(Step(f"fine-tune: {task}", main(task, shards(kind), *more)))
        plan.append(Step(f"score: {task}", main(task, shards(kind), *more, "--mode=eval")))
    more = [f"--config.train.init_from=llm={out / 'language'}", "--mode=eval"]
    plan.append(
        Step(
            "score captions of an untrained model for comparison",
            main("caption", shards("captioning"), *more, workdir="untrained"),
        )
    )
    return plan


def scores_of(out: Path, run: str) -> dict:
    """Scores that the evaluation of a run wrote."""
    return json.loads((out / run / "eval" / "validation" / "scores.json").read_text(encoding="utf-8"))


def wrong_parts(rows: list[dict[str, str]]) -> dict[str, int]:
    """Number of generated titles with a wrong colour, shape or motion. A missing part counts as wrong.

    Args:
      rows: Lines of predictions.jsonl, with the true `title` and the `generated` one.
    """

    def says(pattern: str, title: str) -> str | None:
        found = re.search(pattern, title)
        return found and found[1]

    return {
        part: sum(says(pattern, row["title"]) != says(pattern, row["generated"]) for row in rows)
        for part, pattern in PARTS.items()
    }


def report(out: Path) -> str:
    """Report the results from the files that the steps wrote."""
    evals = [line for line in read_metrics(out / "pretrain") if "eval/loss" in line]
    folder = out / "pretrain" / "eval" / "validation"
    scores = scores_of(out, "pretrain")
    rows = [json.loads(line) for line in text_files.read_lines(folder / "predictions.jsonl")]
    shown = "\n".join(
        f"  {'right' if r['title'] == r['generated'] else 'WRONG'}  {r['title']}  ->  {r['generated']}"
        for r in rows[:12]
    )
    wrong = ", ".join(f"{part} {count}" for part, count in wrong_parts(rows).items())
    classes, captions, untrained, pairs = (
        scores_of(out, run) for run in ("classify", "caption", "untrained", "retrieve")
    )
    pages = "\n".join(f"  {out / run / 'eval' / 'validation' / 'report.html'}" for run in ("pretrain", *BENCHMARKS))
    return (
        f"Validation loss {evals[0]['eval/loss']:.3f} before pre-training (step {evals[0]['step']}), "
        f"{evals[-1]['eval/loss']:.3f} after (step {evals[-1]['step']}).\n"
        f"Titles of clips with unseen combinations of shape, colour and motion (true -> generated):\n{shown}\n"
        f"{scores['exact_titles']:.0f} of {scores['examples']} validation titles are exactly right "
        f"({100 * scores['exact_share']:.0f} %), with a frozen language model; wrong: {wrong}.\n\n"
        f"Classification, {classes['examples']} clips of unseen combinations, 45 classes of which 4 occur "
        f"(chance level 2 %, or 25 % among the four):\n"
        f"  by likelihood, video and title {classes['both/likelihood_top1']:.0f} %, video only "
        f"{classes['video/likelihood_top1']:.0f} %, title only {classes['title/likelihood_top1']:.0f} %; "
        f"by the head {classes['both/head_top1']:.0f} %\n"
        f"Captioning, {captions['clips']} clips: CIDEr {captions['cider']:.2f}, BLEU-4 {captions['bleu4']:.2f}, METEOR "
        f"{captions['meteor']:.2f}, ROUGE-L {captions['rouge_l']:.2f}; untrained: CIDEr {untrained['cider']:.2f}\n"
        f"Retrieval, {pairs['videos']} clips, one title each (chance level of R@1 {100 / pairs['videos']:.1f} %): text to video "
        f"R@1 {pairs['t2v_r1']:.1f} %, R@10 {pairs['t2v_r10']:.1f} %; video to text R@1 {pairs['v2t_r1']:.1f} %\n\n"
        f"Loss curve: {out / 'pretrain' / 'loss.png'}\nReports to open in a browser:\n{pages}"
    )


def main() -> int:
    """Run every step, then print the report. Returns the exit code of the first step that fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=place_copies.local_only, default=Path("runs/demo"), help="folder for all outputs")
    parser.add_argument("--clips", type=int, default=2400, help="number of videos to draw")
    parser.add_argument("--llm", choices=LLMS, default="gpt3", help="kind of the tiny language model")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    plan = steps(out, args.clips, args.llm)
    begin = time.perf_counter()
    for number, (title, command) in enumerate(plan, 1):
        print(f"\n== {number}/{len(plan)} {title}\n$ python -m {' '.join(command)}", flush=True)
        started = time.perf_counter()
        code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT).returncode
        if code:
            print(f"this step failed with exit code {code}; see its message above", file=sys.stderr)
            return code
        print(f"   {time.perf_counter() - started:.0f} s", flush=True)
    print(f"\n== report ({time.perf_counter() - begin:.0f} s in all)\n{report(out)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
