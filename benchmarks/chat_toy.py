"""Trains the tiny chat model on drawn clips with several seeds, and asks it about clips that it has not seen.

    python -m benchmarks.chat_toy --out runs/chat_toy --seeds 3
    python -m benchmarks.chat_toy --out runs/overfit --overfit CLIPS/instruct.jsonl

One JSON line holds, for each seed, the share of right answers in percent, overall and by kind of question; the same with black frames
and with another clip's frames; the most frequent answer of each kind, which needs no clip; and the moving clips played backwards, whose
answers about motion and order are then the opposite ones. `--arm no_titles` leaves out stage 1 for comparison; `--arm lora` trains
both stages with adapters in the decoder as well. `--overfit` trains on the conversations of a file until it knows their answers by heart, and
counts the exact ones. Each step is an ordinary command that is printed before it runs; finished steps are not repeated.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from ymplug_jax.data import conversation

ROOT = Path(__file__).parents[1]
ARMS = ("titles", "no_titles", "lora")
MOVING = ("motion", "order")  # kinds whose answers change when a clip is played backwards
LANGUAGE = (
    "--config.model.llm.width=64",
    "--config.model.llm.depth=2",
    "--config.train.duration=800 steps",
    "--config.optim.lr=3e-3",
)
DECODER = "--config.train.duration=1000 steps"


class Step(NamedTuple):
    """A command after `python -m`, and the file or folder that it makes."""

    command: list[str]
    made: Path


def data_steps(out: Path, clips: int) -> list[Step]:
    """Draw the clips, train the tokenizer and build the shards."""
    corpus, tokenizer = out / "corpus", out / "chat.model"
    steps = [
        Step(["data_prep.draw_shapes", f"--out={corpus}", "--clips=20", f"--chat={clips}"], corpus),
        Step(["data_prep.train_tokenizer", f"--csv={corpus / 'chat_texts.txt'}", f"--out={tokenizer}"], tokenizer),
    ]
    for kind, name, split, folder in (
        ("pretrain", "chat_titles_train.csv", "train", "titles"),
        ("pretrain", "chat_titles_val.csv", "validation", "titles"),
        ("instruct", "instruct_text_train.jsonl", "train", "text"),
        ("instruct", "instruct_text_val.jsonl", "validation", "text"),
        ("instruct", "instruct_train.jsonl", "train", "chat"),
        ("instruct", "instruct_val.jsonl", "validation", "chat"),
        ("instruct", "instruct_backwards.jsonl", "validation", "backwards"),
        ("instruct", "instruct_scene.jsonl", "validation", "scene"),
    ):
        place = out / "shards" / folder
        flags = [f"--config={kind}", f"--csv={corpus / name}", f"--split={split}"]
        command = ["data_prep.build_shards", *flags, f"--video_root={corpus}", f"--out={place}"]
        steps.append(Step(command, out / "done" / f"{folder}_{split}"))
    return steps


def train(
    config: str, argument: str, data: Path, run: Path, start: str, tokenizer: Path, *more: str, name: str = "train"
) -> Step:
    """Train a tiny config from the runs `start`, or evaluate it; `name` tells several steps of a run apart."""
    flags = [f"--config=configs/tiny/{config}.py:{argument}", f"--workdir={run}", f"--config.data.path={data}"]
    flags += [f"--config.data.tokenizer={tokenizer}"]
    flags += [f"--config.train.init_from={start}"] if start else []
    return Step(["ymplug_jax.main", *flags, *more], run.parent / "done" / f"{run.name}_{name}")


def training_steps(out: Path, seed: int, arm: str) -> list[Step]:
    """Train the decoder on text, then both stages, and evaluate."""

    own, shards, tokenizer = out / f"seed_{seed}", out / "shards", out / "chat.model"
    language, decoder = own / "language", own / "decoder"
    titles, chat = own / f"titles_{arm}", own / f"chat_{arm}"
    partition, last = "vision_lora" if arm == "lora" else "vision", (tokenizer, f"--config.train.seed={seed}")
    steps = [
        train("language", "bloom", out / "corpus" / "chat_texts.txt", language, "", *last, *LANGUAGE),
        train("chat_instruct", "decoder", shards / "text", decoder, f"llm={language}", *last, DECODER),
    ]
    start = f"llm={decoder}"
    if arm != "no_titles":
        steps.append(train("chat_pretrain", partition, shards / "titles", titles, start, *last))
        start = str(titles)
    steps.append(train("chat_instruct", partition, shards / "chat", chat, start, *last))
    asked = ("--mode=eval", "--config.options.videos_per_row=1")  # a row holds one conversation then
    steps.append(train("chat_instruct", partition, shards / "chat", chat, start, *last, *asked, name="eval"))
    for name in (
        "backwards",
        "scene",
    ):  # each in a folder of its own, because evaluations of a split replace each other
        run = own / f"{name}_{arm}"
        steps.append(train("chat_instruct", partition, shards / name, run, str(chat), *last, *asked, name="eval"))
    return steps


def overfit_steps(out: Path, file: Path) -> list[Step]:
    """Train a decoder on the texts of a file of conversations, then the whole model, and ask what it was trained on."""
    texts, tokenizer, shards = out / "texts.txt", out / "texts.model", out / "shards"
    if not texts.exists():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        lines = [line for row in rows for line in f"{conversation.SYSTEM}\n{row['text']}".splitlines()]
        texts.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    build = ["--config=instruct", f"--csv={file}", f"--video_root={file.parent}", f"--out={shards}", "--split=train"]
    language, run = out / "language", out / "overfit"
    start, last = f"llm={language}", ("--config.data.eval_split=train", "--config.options.new_tokens=80")
    # A row holds one conversation: the introduction of the large model alone takes 100 tokens of a small tokenizer.
    same = ("--config.data.max_tokens=192", "--config.options.videos_per_row=1", "--config.options.images_per_row=0")
    same = (*same, "--config.model.llm.vocab=1024")
    wide = (*LANGUAGE, "--config.model.llm.vocab=1024", "--config.data.max_tokens=96")
    return [
        Step(["data_prep.train_tokenizer", f"--csv={texts}", f"--out={tokenizer}", "--vocab=1024"], tokenizer),
        Step(["data_prep.build_shards", *build], out / "done" / "shards"),
        train("language", "bloom", texts, language, "", tokenizer, *wide),
        train("chat_instruct", "vision_lora", shards, run, start, tokenizer, *same, *last),
        train("chat_instruct", "vision_lora", shards, run, start, tokenizer, *same, *last, "--mode=eval", name="eval"),
    ]


def results(own: Path, arm: str) -> dict[str, Any]:
    """Scores of a seed in percent, from the files of its evaluations."""

    def read(run: str) -> dict[str, Any]:
        return json.loads((own / f"{run}_{arm}" / "eval" / "validation" / "scores.json").read_text(encoding="utf-8"))

    scores, backwards = read("chat"), read("backwards")["kinds"]

    def percent(found: dict[str, Any], *ends: str) -> dict[str, float]:
        return {end or "right": round(100 * found[f"exact/{end}" if end else "exact"], 1) for end in ends}

    views = ("", "majority", "black", "other")
    kinds = {kind: percent(found, *views) for kind, found in scores["kinds"].items()}
    flipped = {kind: percent(backwards[kind], "")["right"] for kind in MOVING}
    made = {"all": percent(scores, *views), "kinds": kinds, "backwards": flipped, "questions": scores["questions"]}
    return made | {"scene": percent(read("scene"), *views)}


def execute(step: Step) -> None:
    """Run a step unless it is done.

    Raises:
      SystemExit: it fails, with its exit code.
    """
    if step.made.exists():
        return
    print(f"$ python -m {' '.join(step.command)}", file=sys.stderr, flush=True)
    started = time.perf_counter()
    code = subprocess.run([sys.executable, "-m", *step.command], cwd=ROOT, stdout=sys.stderr).returncode
    if code:
        raise SystemExit(code)
    print(f"   {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    if not step.made.exists():
        step.made.parent.mkdir(parents=True, exist_ok=True)
        step.made.touch()


def main() -> None:
    """Run all steps and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/chat_toy"), help="folder for all outputs")
    parser.add_argument("--clips", type=int, default=6400, help="training clips to draw; 200 more for validation")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the training, from 0")
    parser.add_argument("--arm", choices=ARMS, default="titles", help="what is trained, see above")
    parser.add_argument(
        "--overfit", type=Path, help="conversations to learn by heart instead; videos lie beside the file"
    )
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if args.overfit:
        for step in overfit_steps(out, args.overfit.absolute()):
            execute(step)
        scores = json.loads((out / "overfit" / "eval" / "train" / "scores.json").read_text(encoding="utf-8"))
        right = round(scores["exact"] * scores["questions"])
        print(json.dumps({"file": str(args.overfit), "questions": scores["questions"], "exact": right}))
        return
    for step in data_steps(out, args.clips):
        execute(step)
    found = {}
    for seed in range(args.seeds):
        for step in training_steps(out, seed, args.arm):
            execute(step)
        found[seed] = results(out / f"seed_{seed}", args.arm)
    print(json.dumps({"arm": args.arm, "clips": args.clips, "seeds": found}, ensure_ascii=False))


if __name__ == "__main__":
    main()
