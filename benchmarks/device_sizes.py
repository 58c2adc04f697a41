"""Sizes that `--size` of `benchmarks.device` selects."""

from typing import NamedTuple

from benchmarks import torch_captioner
from ymplug_jax.models.abstractor import Abstractor
from ymplug_jax.models.gpt3 import GPT3
from ymplug_jax.models.mplug_video import MPLUGVideo
from ymplug_jax.models.timesformer import TimeSformer


class Size(NamedTuple):
    """Model, batch sizes and number of runs of one `--size`."""

    model: MPLUGVideo
    batch: int  # of a training step
    length: int  # tokens of a title
    long: int  # tokens of a row of the chat model
    rounds: int  # timed runs in each of the two orders
    captions: tuple[tuple[int, int], ...]  # (beams, batch)
    new_tokens: int


SIZES = {
    "small": Size(
        MPLUGVideo(
            vision=TimeSformer(image_size=32, patch_size=16, depth=2, width=64, heads=2, frames=4, clip=False),
            abstractor=Abstractor(queries=8, heads=2),
            llm=GPT3(vocab=512, width=64, depth=2, heads=4, max_positions=192),
        ),
        batch=2, length=16, long=64, rounds=2, captions=((1, 1), (3, 2)), new_tokens=6,
    ),
    "1.3b": Size(
        torch_captioner.MODELS["1.3b"],
        batch=16, length=torch_captioner.LENGTH, long=2048, rounds=8, captions=((1, 1), (1, 16), (5, 4)),
        new_tokens=32,
    ),
}  # fmt: skip
