"""Runs with decoders other than GPT-3: text-only training, pre-training with the decoder frozen, and evaluation."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import runs
import shards
from ymplug_jax import main

pytestmark = pytest.mark.slow

SMALL = [flag for flag in runs.SMALL if ".llm." not in flag]
LLM = ["--config.model.llm.vocab=320", "--config.model.llm.width=32", "--config.model.llm.depth=2"]


def tokenizer(file: Path) -> Path:
    """Train a byte-level BPE with Qwen's control tokens, which have no begin-of-text token."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    model.train_from_iterator([shards.title(i) for i in range(24)], trainer)
    model.save(str(file))
    return file


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("decoders")
    shards.write(home / "data", (13, 8))
    shards.write(home / "data", (9,), split="validation", first=50)
    tokenizer(home / "tokenizer.json")
    return home


def call(home: Path, config: str, workdir: str, *more: str) -> subprocess.CompletedProcess:
    data = [f"--config.data.path={home / 'data'}", f"--config.data.tokenizer={home / 'tokenizer.json'}"]
    settings = [
        f for f in SMALL if config.startswith("pretrain") or not re.search("vision|abstractor|frames|size=16", f)
    ]
    task, _, kind = config.partition(":")
    argv = [f"--config=configs/tiny/{task}.py:{kind}", f"--workdir={home / workdir}", *data, *settings, *LLM]
    return started(*argv, "--config.data.max_tokens=24", *more)


def started(*argv: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ymplug_jax.main", *argv]
    done = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_a_tiny_qwen_is_trained_frozen_and_pretrained_through(home: Path, capsys: pytest.CaptureFixture) -> None:
    call(home, "language:qwen", "language", "--config.train.duration=20 steps", "--config.optim.lr=1e-2")
    start = [f"--config.train.init_from=llm={home / 'language'}", "--config.train.duration=20 steps"]
    said = call(home, "pretrain:qwen", "pretrain", *start, "--config.optim.lr=1e-2").stderr
    assert (
        "a text starts with <|endoftext|> (0), the end-of-text token, since the tokenizer has no beginning token"
        in said
    )
    for folder, fall in (("language", 1.0), ("pretrain", 0.02)):
        losses = list(runs.losses(home / folder).values())
        assert np.isfinite(losses).all() and np.mean(losses[-3:]) < np.mean(losses[:2]) - fall, (folder, losses)
        assert json.loads((home / folder / "config.json").read_text())["model"]["llm"]["kind"] == "qwen"
    before, after = (runs.saved(home / folder) for folder in ("language", "pretrain"))
    assert before.keys() == {path for path in after if path.startswith("llm/")}
    assert all(np.array_equal(before[path], after[path]) for path in before), "the decoder was frozen"

    scores = json.loads(started(f"--workdir={home / 'pretrain'}", "--mode=eval").stdout.splitlines()[-1])
    assert scores["examples"] == 9 and "exact_titles" in scores
    rows = (home / "pretrain" / "eval" / "validation" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(row)["title"] for row in rows} == {shards.title(i) for i in range(50, 59)}

    settings = [f"--config={runs.ROOT}/configs/tiny/pretrain.py:bloom", f"--workdir={home / 'pretrain'}"]
    assert main.main(["main", *settings, f"--config.data.path={home / 'data'}", *SMALL, *LLM]) == 2
    assert (
        "holds a run of another model (config.model.llm.kind 'qwen' -> 'bloom'); use its settings"
        in capsys.readouterr().err
    )
