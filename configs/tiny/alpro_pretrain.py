"""Tiny ALPRO pre-training for a laptop, with the same task, model code and recipe as configs/alpro/pretrain.py."""

from ml_collections import ConfigDict

from configs.alpro.recipe import NO_DECAY
from configs.tiny.recipe import settings
from ymplug_jax.models import alpro
from ymplug_jax.tasks.alpro.pretrain import Options


def get_config(arg: str = "youku") -> ConfigDict:
    """Settings by variant. Set --config.data.path and --config.data.tokenizer=vocab.txt.

    "salesforce" predicts entities and needs a run of configs/tiny/alpro_prompter.py, see configs/alpro/pretrain.py.
    """
    model = alpro.sized("tiny", "tiny", variant=arg, contrastive_width=64, entities=0 if arg == "youku" else 10)
    long = {"lr": 1e-3, "warmup": "50 steps", "duration": "1000 steps"}
    return settings("alpro_pretrain", model, Options(group=16), max_tokens=24, no_decay=NO_DECAY, batch_size=32, **long)
