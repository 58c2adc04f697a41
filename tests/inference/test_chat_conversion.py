"""Converted chat weights are used without a run: settings and tokenizer come from the conversion."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import chats
import ymplug_jax
from ymplug_jax.convert import to_orbax
from ymplug_jax.core.exits import Mistake
from ymplug_jax.core.quantize import Quantized

GOLDEN = Path(__file__).parents[1] / "golden" / "mplug_video_bloomz" / "full.npz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of the fixture's weights, with a tokenizer beside them."""
    home = tmp_path_factory.mktemp("converted")
    with np.load(GOLDEN) as file:
        stored = json.loads(str(file["config"]))
        weights = {n.removeprefix("param/"): torch.from_numpy(file[n]) for n in file.files if n.startswith("param/")}
    save_file(weights, home / "model.safetensors")
    heads = {"vision": stored["vision"]["num_attention_heads"], "llm": stored["bloom"]["n_head"]}
    heads["abstractor"] = stored["abstractor"]["num_attention_heads"]
    chats.tokenizer(home / "tokenizer.json", stored["bloom"]["vocab_size"])
    to_orbax.to_orbax("mplug_chat", [home / "model.safetensors"], home / "out", to_orbax.Wish(heads=heads))
    return home / "out"


def test_a_conversion_holds_conversations(folder: Path) -> None:
    model = ymplug_jax.load(folder)
    made = model.chat_model()
    assert model.methods == ("chat",) and not made.piecewise and made.context == 2048
    assert made.model.vision.double_cls and (folder / "tokenizer" / "tokenizer.json").is_file()
    chats.picture(folder / "a.png", 120)
    session = model.chat(image=folder / "a.png", new_tokens=3, context=512)
    session.ask("视频里有什么？").whole()
    assert session.turns[0].media == ("<image>",) and session.tokens > 3
    made.close()


def test_frozen_matrices_in_eight_bits(folder: Path) -> None:
    model = ymplug_jax.load(folder, int8=True)
    session = model.chat(new_tokens=3, context=512)
    session.ask("视频里有什么？").whole()
    held = model.predictor.params()["llm"]["blocks"]["mlp"]["up"]["kernel"]
    assert isinstance(held, Quantized) and len(session.turns) == 1
    model.chat_model().close()


def test_without_a_tokenizer_the_message_asks_for_one(folder: Path, tmp_path: Path) -> None:
    kept = (folder / "tokenizer" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        with pytest.raises(Mistake, match=r"the conversion has no tokenizer; give tokenizer=FILE"):
            ymplug_jax.load(folder)
        with pytest.raises(Mistake, match=r"^tokenizer=none.json: no such file"):
            ymplug_jax.load(folder, tokenizer="none.json")
        assert ymplug_jax.load(folder, tokenizer=kept).methods == ("chat",)
        with pytest.raises(Mistake, match=r"caption needs a run of task"):
            ymplug_jax.load(folder, tokenizer=kept, needs="caption")
    finally:
        kept.rename(folder / "tokenizer" / "tokenizer.json")
