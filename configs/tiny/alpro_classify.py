"""Category classification small enough for a laptop: the same task and code as configs/alpro/classify.py."""

from ml_collections import ConfigDict

from configs.alpro.recipe import NO_DECAY
from ymplug_jax.core.config import Data, Experiment, Optim, Train, to_config_dict
from ymplug_jax.data.schema import CLASS_NAMES
from ymplug_jax.models import alpro


def get_config() -> ConfigDict:
    """Give --config.data.path, --config.data.tokenizer and --config.train.init_from=DIR (configs/tiny/alpro_pretrain.py)."""
    heads = {"contrastive_width": 0, "matching": False, "masked": False, "classes": len(CLASS_NAMES)}
    experiment = Experiment(
        task="alpro_classify",
        model=alpro.sized("tiny", "tiny", **heads),
        data=Data(frames=4, image_size=64, max_tokens=24, threads=2),
        optim=Optim(lr=3e-4, min_lr=1e-5, warmup="30 steps", clip=1.0, no_decay=NO_DECAY[:-1]),
        train=Train(
            batch_size=16, duration="300 steps", log_every="20 steps", save_every="300 steps", eval_every="300 steps"
        ),
    )
    return to_config_dict(experiment)
