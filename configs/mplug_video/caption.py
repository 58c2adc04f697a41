"""Captioning with mPLUG-video, from a pre-trained run: 16 frames, the reference's beam search with 5 beams.

Use `configs/mplug_video/caption.py:1.3b` (sizes and slices as in pretrain.py) with
    --config.data.path=SHARDS --config.data.tokenizer=tokenizer.json --config.train.init_from=PRETRAINED_RUN
For a search that does not favour short captions, set --config.options.search=beam_by_length. See docs/models/mplug_video.md, "Recipe".
"""

from ml_collections import ConfigDict

from configs.mplug_video import recipe, slices
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.tasks.mplug_video.caption import Options

PER_DEVICE = {"1.3b": 24, "2.7b": 36}


def get_config(arg: str = "1.3b") -> ConfigDict:
    """Settings by size, e.g. "1.3b"; "1.3b@SLICE" adds the layout of a TPU slice."""
    arg, _, place = arg.partition("@")
    size = recipe.split_arg(arg)[0]
    experiment = Experiment(
        task="caption",
        model=recipe.model(arg, frames=16),
        data=Data(
            examples=171_000, frames=16, max_words=80
        ),  # approximate size of the release, for --mode=plan without shards
        optim=recipe.optim(2e-5, 1e-6, "100 steps"),
        train=Train(batch_size=recipe.batch_size(PER_DEVICE, size), duration="10 epochs"),
        options=Options(),
    )
    return to_config_dict(slices.on(experiment, size, place) if place else experiment)
