"""Video-text retrieval with mPLUG-2, from a pre-trained run: contrastive and matching loss; evaluation re-ranks the best 128 pairs.

Use `configs/mplug2/retrieve.py:youku-b16`, `:youku-l14`, `:base` or `:large` with
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt --config.train.init_from=PRETRAINED_RUN
To score all pairs instead of the best, set --config.options.best=0. The frames are Youku-mPLUG's; all other values are assumed, see
docs/models/mplug2.md, "Recipe of fine-tuning".
"""

from ml_collections import ConfigDict

from configs.mplug2 import recipe
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.tasks.mplug2.retrieve import Options

EXAMPLES = 38_000  # approximate size of the release, for --mode=plan without shards
BATCH = 96  # rows of a device
QUEUE = 65_280  # rows: a multiple of the batch, near the 65,536 of the models before it


def get_config(arg: str = "youku-b16") -> ConfigDict:
    """Settings by size; sizes without "youku" have no teacher."""
    batch = recipe.DEVICES * BATCH
    taught = {"momentum": True, "queue": QUEUE, "soft_ramp": EXAMPLES // batch} if arg.startswith("youku") else {}
    model = recipe.model(arg, frames=4, generates=False, contrastive_width=256, matching=True)
    experiment = Experiment(
        task="mplug2_retrieve",
        model=model,
        data=Data(examples=EXAMPLES, max_words=80),
        optim=recipe.optim(model, 1e-4, 1e-7, "2 epochs", eps=1e-8),
        train=Train(batch_size=batch, duration="50 epochs"),
        options=Options(group=BATCH, **taught),
    )
    return to_config_dict(experiment)
