"""Tiny video-text retrieval for a laptop, with the same task and code as configs/mplug_video/retrieve.py."""

from ml_collections import ConfigDict

from configs.mplug_video import recipe
from configs.mplug_video.retrieve import NO_DECAY
from configs.tiny.recipe import settings
from ymplug_jax.models import mplug_video


def get_config(llm: str = "gpt3") -> ConfigDict:
    """Settings by kind of language model: "gpt3", "bloom" or "qwen".

    Set --config.data.path, --config.data.tokenizer and --config.train.init_from=DIR (a run of configs/tiny/pretrain.py).
    """
    model = mplug_video.sized(recipe.tiny(llm), "tiny", queries=8, contrastive_width=32)
    return settings("retrieve", model, lr=1e-3, no_decay=NO_DECAY)
