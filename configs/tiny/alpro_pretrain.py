"""ALPRO small enough for a laptop: the same task, model code and recipe as configs/alpro/pretrain.py."""

from ml_collections import ConfigDict

from configs.alpro.recipe import NO_DECAY
from ymplug_jax.core.config import Data, Experiment, Optim, Options, Train, to_config_dict
from ymplug_jax.models import alpro


def get_config(arg: str = "youku") -> ConfigDict:
    """Give --config.data.path and --config.data.tokenizer=vocab.txt; "salesforce" predicts entities and needs a run of
    configs/tiny/alpro_prompter.py, see configs/alpro/pretrain.py."""
    experiment = Experiment(
        task="alpro_pretrain",
        model=alpro.sized("tiny", "tiny", variant=arg, contrastive_width=64, entities=0 if arg == "youku" else 10),
        data=Data(frames=4, image_size=64, max_tokens=24, threads=2),
        optim=Optim(lr=1e-3, min_lr=1e-5, warmup="50 steps", clip=1.0, no_decay=NO_DECAY),
        train=Train(
            batch_size=32,
            duration="1000 steps",
            log_every="20 steps",
            save_every="500 steps",
            eval_every="500 steps",
            frozen_dtype="float32",
        ),
        options=Options(group=16),
    )
    return to_config_dict(experiment)
