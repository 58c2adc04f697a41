"""Tiny retrieval with mPLUG-2 for a laptop, with the same task and code as configs/mplug2/retrieve.py."""

from ml_collections import ConfigDict

from configs.mplug2 import recipe
from configs.tiny.recipe import settings
from ymplug_jax.models import mplug2
from ymplug_jax.tasks.mplug2.retrieve import Options


def get_config(arg: str = "mplug_youku") -> ConfigDict:
    """Settings by variant; set --config.data.path, --config.data.tokenizer and --config.train.init_from=DIR (a run of configs/tiny/mplug2_pretrain.py)."""
    size = recipe.tiny(arg)
    model = mplug2.sized(size, generates=False, contrastive_width=64, matching=True)
    taught = {"momentum": True, "queue": 256, "soft_ramp": 100} if arg == "mplug_youku" else {}
    short = {"batch_size": 32, "duration": "300 steps", "every": "300 steps"}
    options = Options(group=16, **taught)
    return settings("mplug2_retrieve", model, options, max_tokens=24, no_decay=recipe.no_decay(model), **short)
