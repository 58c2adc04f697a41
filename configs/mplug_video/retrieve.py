"""Video-text retrieval with mPLUG-video, from a pre-trained run: contrastive loss over the global batch, embedding width 256.

Use `configs/mplug_video/retrieve.py:1.3b` (sizes and slices as in pretrain.py) with
    --config.data.path=SHARDS --config.data.tokenizer=tokenizer.json --config.train.init_from=PRETRAINED_RUN
See docs/models/mplug_video.md, "Recipe".
"""

from ml_collections import ConfigDict

from configs.mplug_video import recipe, slices
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict

PER_DEVICE = {"1.3b": 96, "2.7b": 64}
# Retrieval does not train abstractor and connector, and every pattern must match a trained parameter.
NO_DECAY = tuple(pattern for pattern in recipe.NO_DECAY if not pattern.startswith("abstractor"))


def get_config(arg: str = "1.3b") -> ConfigDict:
    """Settings by size, e.g. "1.3b"; "1.3b@SLICE" adds the layout of a TPU slice."""
    arg, _, place = arg.partition("@")
    size = recipe.split_arg(arg)[0]
    experiment = Experiment(
        task="retrieve",
        model=recipe.model(arg, contrastive_width=256),
        data=Data(examples=38_000, max_words=80),  # approximate size of the release, for --mode=plan without shards
        optim=recipe.optim(1e-4, 1e-7, "2 epochs", eps=1e-8, no_decay=NO_DECAY),
        train=Train(
            batch_size=recipe.batch_size(PER_DEVICE, size),
            duration="50 epochs",
        ),
    )
    return to_config_dict(slices.on(experiment, size, place) if place else experiment)
