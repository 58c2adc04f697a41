"""Tiny captioning for a laptop, with the same task and code as configs/mplug_video/caption.py."""

from ml_collections import ConfigDict

from configs.mplug_video import recipe
from configs.tiny.recipe import settings
from ymplug_jax.models import mplug_video
from ymplug_jax.tasks.mplug_video.caption import Options


def get_config(llm: str = "gpt3") -> ConfigDict:
    """Settings by kind of language model: "gpt3", "bloom" or "qwen".

    Set --config.data.path, --config.data.tokenizer and --config.train.init_from=DIR (a run of configs/tiny/pretrain.py).
    """
    model = mplug_video.sized(recipe.tiny(llm), "tiny", queries=8)
    return settings("caption", model, Options(prompt_tokens=4, new_tokens=24), duration="300 steps")
