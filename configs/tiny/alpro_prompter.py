"""The teacher of entities small enough for a laptop: the same task and code as configs/alpro/prompter.py."""

from ml_collections import ConfigDict

from configs.alpro.recipe import NO_DECAY
from ymplug_jax.core.config import Data, Experiment, Optim, Train, to_config_dict
from ymplug_jax.models import alpro


def get_config() -> ConfigDict:
    """Give --config.data.path, --config.data.tokenizer=vocab.txt and --config.options.prompts=prompts.json."""
    experiment = Experiment(
        task="alpro_prompter",
        model=alpro.prompter_of(alpro.sized("tiny", "tiny", variant="salesforce", contrastive_width=64)),
        data=Data(frames=4, image_size=64, max_tokens=24, threads=2),
        optim=Optim(lr=1e-3, min_lr=1e-5, warmup="50 steps", clip=1.0, no_decay=NO_DECAY),
        train=Train(
            batch_size=32, duration="500 steps", log_every="20 steps", save_every="500 steps", eval_every="500 steps"
        ),
    )
    return to_config_dict(experiment)
