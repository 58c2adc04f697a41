"""Tiny language model trained on titles only, to be frozen in the other tiny configs."""

from ml_collections import ConfigDict

from configs.mplug_video import recipe
from ymplug_jax.core.config import Data, Experiment, Optim, Train, to_config_dict
from ymplug_jax.models import language_models


def get_config(llm: str = "gpt3") -> ConfigDict:
    """Settings by kind of language model: "gpt3", "bloom" or "qwen".

    Set --config.data.path=titles.txt (one title a line) or shards, and --config.data.tokenizer.
    """
    experiment = Experiment(
        task="language",
        model={"llm": language_models.SIZES[recipe.tiny(llm)]},
        data=Data(max_tokens=64, eval_split="", threads=2),
        # Joined into one pattern, because every pattern must match a parameter and Qwen3 has no biases.
        optim=Optim(lr=1e-3, min_lr=1e-5, warmup="50 steps", clip=1.0, no_decay=("|".join(recipe.NO_DECAY[:2]),)),
        train=Train(batch_size=32, duration="300 steps", log_every="20 steps", save_every="300 steps"),
    )
    return to_config_dict(experiment)
