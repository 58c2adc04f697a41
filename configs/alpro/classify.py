"""Category classification with ALPRO, from a pre-trained run: 8 frames, 45 classes, a head on title and video.

Use `configs/alpro/classify.py:youku` (vision towers as in pretrain.py) with
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt --config.train.init_from=PRETRAINED_RUN
See docs/models/alpro.md, "Recipe".
"""

from ml_collections import ConfigDict

from configs.alpro import recipe
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.data.schema import CLASS_NAMES
from ymplug_jax.tasks.alpro.classify import Options


def get_config(arg: str = "youku") -> ConfigDict:
    """Settings by variant and vision tower; batch size, learning rates and duration are not published but assumed."""
    heads = {"contrastive_width": 0, "matching": False, "masked": False, "classes": len(CLASS_NAMES)}
    experiment = Experiment(
        task="alpro_classify",
        model=recipe.model(arg, frames=8, **heads),
        data=Data(
            examples=100_000, frames=8, max_words=80
        ),  # approximate size of the release, for --mode=plan without shards
        optim=recipe.optim(
            2e-5, 1e-6, "100 steps", clip=recipe.split_arg(arg)[1] != "b16", no_decay=recipe.NO_DECAY[:-1]
        ),
        train=Train(batch_size=recipe.DEVICES * 32, duration="10 epochs"),
        options=Options(),
    )
    return to_config_dict(experiment)
