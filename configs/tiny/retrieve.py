"""Video-text retrieval small enough for a laptop: the same task and code as configs/mplug_video/retrieve.py."""

from ml_collections import ConfigDict

from configs.mplug_video.retrieve import NO_DECAY
from ymplug_jax.core.config import Data, Experiment, Optim, Train, to_config_dict
from ymplug_jax.models import mplug_video


def get_config() -> ConfigDict:
    """Give --config.data.path, --config.data.tokenizer and --config.train.init_from=DIR (a run of configs/tiny/pretrain.py)."""
    experiment = Experiment(
        task="retrieve",
        model=mplug_video.sized("tiny", "tiny", queries=8, contrastive_width=32),
        data=Data(frames=4, image_size=64, max_tokens=40, threads=2),
        optim=Optim(lr=1e-3, min_lr=1e-5, warmup="30 steps", clip=1.0, no_decay=NO_DECAY),
        train=Train(
            batch_size=16,
            duration="500 steps",
            log_every="20 steps",
            save_every="500 steps",
            eval_every="500 steps",
            frozen_dtype="float32",
        ),
    )
    return to_config_dict(experiment)
