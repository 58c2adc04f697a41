"""The language task: log-probabilities of whole titles, which the perplexity of the Python API and of curation is made of."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import runs
import shards
import ymplug_jax
from data_prep.curation.perplexity import TitleModel, perplexity_of
from data_prep.curation.settings import Titles
from ymplug_jax import command_line
from ymplug_jax.core import config
from ymplug_jax.core.checkpoint import Checkpoints
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data.text import load_tokenizer
from ymplug_jax.tasks.mplug_video.language import LanguageModel
from ymplug_jax.tasks.task import build
from ymplug_jax.training import run_folder, setup

SMALL = [
    flag for flag in runs.SMALL if "llm" in flag or "data.max_tokens" in flag or "optim" in flag or "batch" in flag
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a checkpoint, without any training."""
    home = tmp_path_factory.mktemp("language")
    shards.tokenizer(home / "t.model")
    (home / "titles.txt").write_text("红色的圆形\n" * 20, encoding="utf-8")
    data = [f"--config.data.path={home / 'titles.txt'}", f"--config.data.tokenizer={home / 't.model'}"]
    words = ["--config", str(runs.ROOT / "configs/tiny/language.py"), *data, *SMALL, "--config.data.max_tokens=16"]
    flags, settings = command_line.parse(words)
    experiment: config.Experiment = command_line.experiment_of(flags, settings)
    run = setup.prepare(experiment)
    run_folder.write(experiment, home / "run")
    checkpoints = Checkpoints(str(home / "run"))
    state, frozen, seen, _ = setup.initialise(run, checkpoints)
    checkpoints.save_frozen(frozen)
    checkpoints.save(state, 1, seen)
    checkpoints.close()
    return home / "run"


def test_perplexity_is_that_of_the_title_alone(folder: Path):
    """The repetitions of a short title, the rest of the batch, and what is cut off a long one do not count."""
    model = ymplug_jax.load(folder)
    assert model.methods == ("perplexity",)
    titles = ["红色的圆形", "蓝色的方形在移动", "圆", "红色的圆形" * 9]
    found = model.perplexity(titles)
    assert found[0] == pytest.approx(model.perplexity(titles[:1])[0], rel=1e-6)
    module = build(LanguageModel, model.predictor.experiment.model)
    tokenizer = load_tokenizer(str(folder / "tokenizer" / "t.model"))
    for title, value in zip(titles, found, strict=True):
        end = [tokenizer.eos] if tokenizer.eos != tokenizer.bos else []
        ids = np.array([[tokenizer.bos, *tokenizer.encode(title), *end]])
        read = ids[:, :16]
        logits = module.apply({"params": model.predictor.params()}, jnp.asarray(read))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), read[:, 1:, None], axis=-1)
        tokens = ids.shape[1] - 1
        assert value == pytest.approx(math.exp(-float(chosen.mean()) * tokens / len(title)), rel=1e-4)


def test_the_perplexity_of_curation(folder: Path):
    assert perplexity_of(Titles()) is None  # no title is said to be checked
    measure = perplexity_of(Titles(language_model=str(folder)))
    assert isinstance(measure, TitleModel)
    first, nothing, second = measure(["红色的　圆\u200b形", "😂😂", "圆"])
    assert nothing is None and measure([]) == []
    assert [first, second] == pytest.approx(ymplug_jax.load(folder).perplexity(["红色的 圆形", "圆"]), rel=1e-6)


def test_other_folders_are_refused(tmp_path: Path):
    with pytest.raises(Mistake):
        TitleModel(str(tmp_path))(["红色的圆形"])
