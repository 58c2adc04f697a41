"""mPLUG-video small enough for a laptop: the same task, model code and recipe as configs/mplug_video/pretrain.py."""

from ml_collections import ConfigDict

from configs.mplug_video import recipe
from configs.tiny.recipe import settings
from ymplug_jax.models import mplug_video


def get_config(llm: str = "gpt3") -> ConfigDict:
    """By kind of the language model: "gpt3", "bloom" or "qwen".

    Give --config.data.path, --config.data.tokenizer and --config.train.init_from=llm=DIR (configs/tiny/language.py).
    """
    model = mplug_video.sized(recipe.tiny(llm), "tiny", queries=8)
    # The tower begins from nothing at a width of 64. With the reference's start values, made for 768 and a tower that knows
    # images, the direction in time stays unlearned for a number of steps that rounding decides, often all of them.
    model = model.clone(vision=model.vision.clone(std=0.1, table_std=0.3))
    return settings(
        "pretrain", model, max_tokens=32, lr=1e-3, warmup="50 steps", duration="2400 steps", every="1200 steps"
    )
