"""Tiny mPLUG-2 pre-training for a laptop, with the same task and code as configs/mplug2/pretrain.py."""

from ml_collections import ConfigDict

from configs.mplug2 import recipe
from configs.tiny.recipe import settings
from ymplug_jax.models import mplug2
from ymplug_jax.tasks.mplug2.pretrain import Options


def get_config(arg: str = "mplug_youku") -> ConfigDict:
    """Settings by variant, mplug_youku or mplug2. Set --config.data.path and --config.data.tokenizer=vocab.txt."""
    if arg not in mplug2.VARIANTS:
        raise ValueError(f"unknown variant {arg!r}; choose one of {', '.join(mplug2.VARIANTS)}")
    youku = arg == "mplug_youku"
    size = "youku-tiny" if youku else "tiny"
    model = mplug2.sized(size, contrastive_width=64, matching=True, masked=True)
    options = Options(group=16, momentum=True, queue=256, soft_ramp=100) if youku else Options(group=16)
    no_decay = recipe.NO_DECAY[arg]
    long = {"lr": 1e-3, "warmup": "50 steps", "duration": "1000 steps"}
    return settings("mplug2_pretrain", model, options, max_tokens=24, no_decay=no_decay, batch_size=32, **long)
