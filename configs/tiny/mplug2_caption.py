"""Tiny captioning with mPLUG-2 for a laptop, with the same task and code as configs/mplug2/caption.py."""

from ml_collections import ConfigDict

from configs.mplug2 import recipe
from configs.tiny.recipe import settings
from ymplug_jax.models import mplug2
from ymplug_jax.tasks.mplug2.caption import Options


def get_config(arg: str = "mplug_youku") -> ConfigDict:
    """Settings by variant, mplug_youku or mplug2.

    Set --config.data.path, --config.data.tokenizer=vocab.txt and --config.train.init_from=DIR (a run of configs/tiny/mplug2_pretrain.py of
    the same variant).
    """
    model = mplug2.sized(recipe.tiny(arg), reads=False)
    short = {"max_tokens": 24, "batch_size": 32, "duration": "300 steps", "every": "300 steps"}
    return settings("mplug2_caption", model, Options(new_tokens=24), no_decay=recipe.no_decay(model), **short)
