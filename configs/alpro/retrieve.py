"""Video-text retrieval with ALPRO, from a pre-trained run: contrastive and matching loss; evaluation re-ranks the best 32 pairs.

Use `configs/alpro/retrieve.py:youku` (vision towers as in pretrain.py) or `:salesforce` with
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt --config.train.init_from=PRETRAINED_RUN
To score all pairs instead of the best, set --config.options.best=0. See docs/models/alpro.md, "Recipe".
"""

from ml_collections import ConfigDict

from configs.alpro import recipe
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.tasks.alpro.retrieve import Options

EXAMPLES = 38_000  # approximate size of the release, for --mode=plan without shards


def get_config(arg: str = "youku") -> ConfigDict:
    """Settings by variant and vision tower; Youku's are assumed, Salesforce's are published for MSRVTT."""
    variant, vision = recipe.split_arg(arg)
    if variant == "youku":
        experiment = Experiment(
            task="alpro_retrieve",
            model=recipe.model(arg, masked=False),
            data=Data(examples=EXAMPLES, max_words=80),
            optim=recipe.optim(1e-4, 1e-7, "2 epochs", eps=1e-8, clip=vision != "b16"),
            train=Train(batch_size=recipe.DEVICES * 96, duration="50 epochs"),
            options=Options(group=96),
        )
    else:
        experiment = Experiment(
            task="alpro_retrieve",
            model=recipe.model(arg, frames=8, masked=False),
            data=Data(examples=EXAMPLES, frames=8, max_tokens=40, max_words=80),
            optim=recipe.salesforce_optim(2.5e-5, "10%", clip=5.0),
            train=Train(batch_size=8 * 8, duration="5 epochs"),
            options=Options(group=8),
        )
    return to_config_dict(experiment)
