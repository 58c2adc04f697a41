"""Tiny retrieval with ALPRO for a laptop, with the same task and code as configs/alpro/retrieve.py."""

from ml_collections import ConfigDict

from configs.alpro.recipe import NO_DECAY
from configs.tiny.recipe import settings
from ymplug_jax.models import alpro
from ymplug_jax.tasks.alpro.retrieve import Options


def get_config() -> ConfigDict:
    """Set --config.data.path, --config.data.tokenizer and --config.train.init_from=DIR (a run of configs/tiny/alpro_pretrain.py)."""
    short = {
        "max_tokens": 24,
        "batch_size": 32,
        "duration": "300 steps",
        "every": "300 steps",
        "frozen_dtype": "bfloat16",
    }
    return settings(
        "alpro_retrieve",
        alpro.sized("tiny", "tiny", contrastive_width=64, masked=False),
        Options(group=16),
        no_decay=NO_DECAY,
        **short,
    )
