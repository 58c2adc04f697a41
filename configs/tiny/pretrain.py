"""Tiny mPLUG-video pre-training for a laptop, with the same task, model code and recipe as configs/mplug_video/pretrain.py."""

from ml_collections import ConfigDict

from configs.mplug_video import recipe
from configs.tiny.recipe import settings
from ymplug_jax.models import mplug_video


def get_config(llm: str = "gpt3") -> ConfigDict:
    """Settings by kind of language model: "gpt3", "bloom" or "qwen".

    Set --config.data.path, --config.data.tokenizer and --config.train.init_from=llm=DIR (a run of configs/tiny/language.py).
    """
    model = mplug_video.sized(recipe.tiny(llm), "tiny", queries=8)
    # This vision tower starts from random weights at width 64. The reference's initialisation is for width 768 and CLIP weights; with
    # it the model often never learns the direction of motion, depending on rounding.
    model = model.clone(vision=model.vision.clone(std=0.1, table_std=0.3))
    return settings(
        "pretrain", model, max_tokens=32, lr=1e-3, warmup="50 steps", duration="2400 steps", every="1200 steps"
    )
