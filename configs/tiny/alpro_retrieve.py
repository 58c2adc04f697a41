"""Retrieval small enough for a laptop: the same task and code as configs/alpro/retrieve.py."""

from ml_collections import ConfigDict

from configs.alpro.recipe import NO_DECAY
from ymplug_jax.core.config import Data, Experiment, Optim, Options, Train, to_config_dict
from ymplug_jax.models import alpro


def get_config() -> ConfigDict:
    """Give --config.data.path, --config.data.tokenizer and --config.train.init_from=DIR (configs/tiny/alpro_pretrain.py)."""
    experiment = Experiment(
        task="alpro_retrieve",
        model=alpro.sized("tiny", "tiny", contrastive_width=64, masked=False),
        data=Data(frames=4, image_size=64, max_tokens=24, threads=2),
        optim=Optim(lr=3e-4, min_lr=1e-5, warmup="30 steps", clip=1.0, no_decay=NO_DECAY),
        train=Train(
            batch_size=32, duration="300 steps", log_every="20 steps", save_every="300 steps", eval_every="300 steps"
        ),
        options=Options(group=16),
    )
    return to_config_dict(experiment)
