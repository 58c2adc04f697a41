"""Pre-training of mPLUG-video on video-title pairs with the published recipe.

`configs/mplug_video/pretrain.py:1.3b` or `:2.7b`, and the vision tower after a comma: `:1.3b,l14` (default b16).
Give the data and the weights on the command line:
    --config.data.path=SHARDS --config.data.tokenizer=tokenizer.json --config.train.init_from=llm=GPT3_DIR,vision=CLIP_DIR
"""

from ml_collections import ConfigDict

from ymplug_jax.config import Data, Experiment, Optim, Train, to_config_dict
from ymplug_jax.models import mplug_video

# No decay for one-dimensional tensors (norms, biases, extra key and value) and the vision tower's own tables.
# Queries and temperature do decay, as in the recipe.
NO_DECAY = (r".*/bias", r".*norm.*/scale", r"vision/(cls|pos_embed|temporal_embed)", r"abstractor/extra_(key|value)")
# What came from CLIP learns at a tenth of the rate; temporal parts are new and learn at the full rate.
CLIP_LR = ((r"vision/(?!.*temporal).*", 0.1),)
PER_DEVICE = {"1.3b": 48, "2.7b": 32}  # the recipe's batch a device; 8 devices


def get_config(arg: str = "1.3b") -> ConfigDict:
    """Settings by size: "1.3b", "2.7b", "1.3b,l14", "2.7b,l14".

    Raises:
      ValueError: an unknown size.
    """
    llm, _, vision = arg.partition(",")
    if llm not in PER_DEVICE:
        raise ValueError(f"size {llm!r} is unknown; there are {', '.join(PER_DEVICE)}, each also as SIZE,l14")
    model = mplug_video.sized(llm, vision or "b16")
    model = model.clone(
        vision=model.vision.clone(dtype="bfloat16", remat="full"),
        abstractor=model.abstractor.clone(dtype="bfloat16"),
        # The published runs left dropout on inside the frozen decoder; 0.0 is the cleaner choice for a run of your own.
        llm=model.llm.clone(dtype="bfloat16", remat="full", dropout=0.1),
    )
    experiment = Experiment(
        task="pretrain",
        model=model,
        data=Data(examples=10_009_370),  # rows of the released pre-training table, for --mode=plan without shards
        optim=Optim(lr=1e-4, min_lr=1e-6, warmup="2000 steps", eps=1e-6, no_decay=NO_DECAY, lr_scales=CLIP_LR),
        train=Train(
            batch_size=8 * PER_DEVICE[llm], duration="10 epochs", save_every="2000 steps", eval_every="2000 steps"
        ),
    )
    return to_config_dict(experiment)
