"""Video-text matching with mPLUG-video, from a pre-trained run: the decoder answers yes or no, beside a classification head.

Use `configs/mplug_video/match.py:1.3b` (sizes and slices as in pretrain.py) with
    --config.data.path=SHARDS --config.data.tokenizer=tokenizer.json --config.train.init_from=PRETRAINED_RUN
To re-rank candidates instead of scoring all pairs, set --config.options.candidates=RETRIEVAL_RUN/eval/validation/index.npz.
See docs/models/mplug_video.md, "Recipe".
"""

from ml_collections import ConfigDict

from configs.mplug_video import recipe, slices
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.tasks.mplug_video.match import Options

PER_DEVICE = {"1.3b": 96, "2.7b": 64}


def get_config(arg: str = "1.3b") -> ConfigDict:
    """Settings by size, e.g. "1.3b"; "1.3b@SLICE" adds the layout of a TPU slice."""
    arg, _, place = arg.partition("@")
    size = recipe.split_arg(arg)[0]
    experiment = Experiment(
        task="match",
        model=recipe.model(arg, classes=2),
        data=Data(examples=38_000, max_words=80),  # approximate size of the release, for --mode=plan without shards
        optim=recipe.optim(1e-4, 1e-7, "2 epochs", eps=1e-8),
        train=Train(batch_size=recipe.batch_size(PER_DEVICE, size), duration="50 epochs"),
        options=Options(group=PER_DEVICE[recipe.LLMS[size]]),
    )
    return to_config_dict(slices.on(experiment, size, place) if place else experiment)
