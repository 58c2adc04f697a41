"""mPLUG-video small enough for a laptop: the same task, model code and recipe as configs/mplug_video/pretrain.py."""

from ml_collections import ConfigDict

from configs.mplug_video.recipe import NO_DECAY
from ymplug_jax.core.config import Data, Experiment, Optim, Train, to_config_dict
from ymplug_jax.models import mplug_video


def get_config() -> ConfigDict:
    """Give --config.data.path, --config.data.tokenizer and --config.train.init_from=llm=DIR (configs/tiny/language.py)."""
    model = mplug_video.sized("tiny", "tiny", queries=8)
    # The tower begins from nothing at a width of 64. With the reference's start values, made for 768 and a tower that knows
    # images, the direction in time stays unlearned for a number of steps that rounding decides, often all of them.
    model = model.clone(vision=model.vision.clone(std=0.1, table_std=0.3))
    experiment = Experiment(
        task="pretrain",
        model=model,
        data=Data(frames=4, image_size=64, max_tokens=32, threads=2),
        optim=Optim(lr=1e-3, min_lr=1e-5, warmup="50 steps", clip=1.0, no_decay=NO_DECAY),
        train=Train(
            batch_size=16,
            duration="2400 steps",
            log_every="20 steps",
            save_every="1200 steps",
            eval_every="1200 steps",
            frozen_dtype="float32",
        ),
    )
    return to_config_dict(experiment)
