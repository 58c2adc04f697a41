"""Captioning with mPLUG-video, from a pre-trained run: 16 frames, beam search of 5 with the reference's rule.

`configs/mplug_video/caption.py:1.3b` (sizes and slices as in pretrain.py), with
    --config.data.path=SHARDS --config.data.tokenizer=tokenizer.json --config.train.init_from=PRETRAINED_RUN
A search that does not favour short captions: --config.options.search=beam_by_length.
"""

from ml_collections import ConfigDict

from configs.mplug_video import recipe, slices
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict

PER_DEVICE = {"1.3b": 24, "2.7b": 36}


def get_config(arg: str = "1.3b") -> ConfigDict:
    """Settings by size; with "@SLICE" for a TPU slice."""
    arg, _, place = arg.partition("@")
    size = recipe.split_arg(arg)[0]
    experiment = Experiment(
        task="caption",
        model=recipe.model(arg, frames=16),
        data=Data(examples=171_000, frames=16, max_words=80),  # about so many are released, for --mode=plan
        optim=recipe.optim(2e-5, 1e-6, "100 steps"),
        train=Train(batch_size=recipe.DEVICES * PER_DEVICE[size], duration="10 epochs"),
    )
    return to_config_dict(slices.on(experiment, size, place) if place else experiment)
