"""The tiny language model on the titles alone: what a large Chinese GPT-3 has learned long before, in miniature."""

from ml_collections import ConfigDict

from configs.mplug_video.recipe import NO_DECAY
from ymplug_jax.core.config import Data, Experiment, Optim, Train, to_config_dict
from ymplug_jax.models import language_models


def get_config() -> ConfigDict:
    """Give --config.data.path=titles.txt (one title a line) or shards, and --config.data.tokenizer."""
    experiment = Experiment(
        task="language",
        model={"llm": language_models.SIZES["tiny"]},
        data=Data(max_tokens=64, eval_split="", threads=2),
        optim=Optim(lr=1e-3, min_lr=1e-5, warmup="50 steps", clip=1.0, no_decay=NO_DECAY[:2]),
        train=Train(batch_size=32, duration="300 steps", log_every="20 steps", save_every="300 steps"),
    )
    return to_config_dict(experiment)
