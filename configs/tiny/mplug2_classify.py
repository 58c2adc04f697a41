"""Tiny category classification with mPLUG-2 for a laptop, with the same task and code as configs/mplug2/classify.py."""

from ml_collections import ConfigDict

from configs.mplug2 import recipe
from configs.tiny.recipe import settings
from ymplug_jax.data.schema import CLASS_NAMES
from ymplug_jax.models import mplug2


def get_config(arg: str = "mplug_youku") -> ConfigDict:
    """Settings by variant; set --config.data.path, --config.data.tokenizer and --config.train.init_from=DIR (a run of configs/tiny/mplug2_pretrain.py)."""
    model = mplug2.sized(recipe.tiny(arg), generates=False, classes=len(CLASS_NAMES))
    short = {"batch_size": 16, "duration": "300 steps", "every": "300 steps"}
    return settings("mplug2_classify", model, max_tokens=24, no_decay=recipe.no_decay(model), **short)
