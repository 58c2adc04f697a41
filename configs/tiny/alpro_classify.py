"""Tiny category classification with ALPRO for a laptop, with the same task and code as configs/alpro/classify.py."""

from ml_collections import ConfigDict

from configs.alpro.recipe import NO_DECAY
from configs.tiny.recipe import settings
from ymplug_jax.data.schema import CLASS_NAMES
from ymplug_jax.models import alpro
from ymplug_jax.tasks.alpro.classify import Options


def get_config() -> ConfigDict:
    """Set --config.data.path, --config.data.tokenizer and --config.train.init_from=DIR (a run of configs/tiny/alpro_pretrain.py)."""
    heads = {"contrastive_width": 0, "matching": False, "masked": False, "classes": len(CLASS_NAMES)}
    short = {
        "max_tokens": 24,
        "batch_size": 16,
        "duration": "300 steps",
        "every": "300 steps",
        "frozen_dtype": "bfloat16",
    }
    return settings("alpro_classify", alpro.sized("tiny", "tiny", **heads), Options(), no_decay=NO_DECAY[:-1], **short)
