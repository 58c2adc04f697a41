"""Captioning small enough for a laptop: the same task and code as configs/mplug_video/caption.py."""

from ml_collections import ConfigDict

from configs.mplug_video.recipe import NO_DECAY
from ymplug_jax.core.config import Data, Experiment, Optim, Options, Train, to_config_dict
from ymplug_jax.models import mplug_video


def get_config() -> ConfigDict:
    """Give --config.data.path, --config.data.tokenizer and --config.train.init_from=DIR (a run of configs/tiny/pretrain.py)."""
    experiment = Experiment(
        task="caption",
        model=mplug_video.sized("tiny", "tiny", queries=8),
        data=Data(frames=4, image_size=64, max_tokens=40, threads=2),
        optim=Optim(lr=3e-4, min_lr=1e-5, warmup="30 steps", clip=1.0, no_decay=NO_DECAY),
        train=Train(
            batch_size=16,
            duration="300 steps",
            log_every="20 steps",
            save_every="500 steps",
            eval_every="500 steps",
            frozen_dtype="float32",
        ),
        options=Options(prompt_tokens=4, new_tokens=24),
    )
    return to_config_dict(experiment)
