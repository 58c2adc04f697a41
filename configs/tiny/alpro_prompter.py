"""Tiny ALPRO prompter, the teacher of entities, for a laptop, with the same task and code as configs/alpro/prompter.py."""

from ml_collections import ConfigDict

from configs.alpro.recipe import NO_DECAY
from configs.tiny.recipe import settings
from ymplug_jax.models import alpro
from ymplug_jax.tasks.alpro.prompter import Options


def get_config() -> ConfigDict:
    """Set --config.data.path, --config.data.tokenizer=vocab.txt and --config.options.prompts=prompts.json."""
    model = alpro.prompter_of(alpro.sized("tiny", "tiny", variant="salesforce", contrastive_width=64))
    more = {"max_tokens": 24, "lr": 1e-3, "warmup": "50 steps", "batch_size": 32, "frozen_dtype": "bfloat16"}
    return settings("alpro_prompter", model, Options(), no_decay=NO_DECAY, **more)
