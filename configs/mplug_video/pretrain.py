"""Pre-training of mPLUG-video on video-title pairs with the published recipe.

`configs/mplug_video/pretrain.py:1.3b` or `:2.7b`, and the vision tower after a comma: `:1.3b,l14` (default b16).
`@` and a slice lays the run out for it, with a batch to match: `:1.3b@v5p-64`; see slices.py.
Give the data and the weights on the command line:
    --config.data.path=SHARDS --config.data.tokenizer=tokenizer.json --config.train.init_from=llm=GPT3_DIR,vision=CLIP_DIR
"""

from ml_collections import ConfigDict

from configs.mplug_video import recipe, slices
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict

PER_DEVICE = {"1.3b": 48, "2.7b": 32}


def get_config(arg: str = "1.3b") -> ConfigDict:
    """Settings by size: "1.3b", "2.7b", "1.3b,l14", "2.7b,l14"; with "@SLICE" for a TPU slice."""
    arg, _, place = arg.partition("@")
    size = recipe.split_arg(arg)[0]
    experiment = Experiment(
        task="pretrain",
        model=recipe.model(arg),
        data=Data(examples=10_009_370),  # rows of the released pre-training table, for --mode=plan without shards
        optim=recipe.optim(1e-4, 1e-6, "2000 steps"),
        train=Train(
            batch_size=recipe.DEVICES * PER_DEVICE[size],
            duration="10 epochs",
            save_every="2000 steps",
            eval_every="2000 steps",
        ),
    )
    return to_config_dict(slices.on(experiment, size, place) if place else experiment)
