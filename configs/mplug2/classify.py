"""Category classification with mPLUG-2, from a pre-trained run: 8 frames, 45 classes, a head on title and video.

Use `configs/mplug2/classify.py:youku-b16`, `:youku-l14`, `:base` or `:large` with
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt --config.train.init_from=PRETRAINED_RUN
The frames are Youku-mPLUG's; all other values are assumed, see docs/models/mplug2.md, "Recipe of fine-tuning".
"""

from ml_collections import ConfigDict

from configs.mplug2 import recipe
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.data.schema import CLASS_NAMES


def get_config(arg: str = "youku-b16") -> ConfigDict:
    """Settings by size."""
    model = recipe.model(arg, frames=8, generates=False, classes=len(CLASS_NAMES))
    experiment = Experiment(
        task="mplug2_classify",
        model=model,
        data=Data(
            examples=100_000, frames=8, max_words=80
        ),  # approximate size of the release, for --mode=plan without shards
        optim=recipe.optim(model, 2e-5, 1e-6, "100 steps"),
        train=Train(batch_size=recipe.DEVICES * 32, duration="10 epochs"),
    )
    return to_config_dict(experiment)
