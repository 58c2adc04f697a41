"""Pre-training of mPLUG-video on video-title pairs with the published recipe.

Use `configs/mplug_video/pretrain.py:SIZE`, with the vision tower after a comma: `:1.3b,l14` (default b16). SIZE names the language
model: 1.3b, 2.7b (GPT-3, the published runs), bloomz-1b7, bloomz-7b1, qwen2.5-1.5b, qwen2.5-7b, qwen3-1.7b, qwen3-8b. Sizes without
a published run use the batch size of the nearest published one.
`@SLICE` adds the layout and batch size for a TPU slice: `:1.3b@v5p-64`; see slices.py.
Set the data and the weights on the command line:
    --config.data.path=SHARDS --config.data.tokenizer=tokenizer.json --config.train.init_from=llm=LLM_DIR,vision=CLIP_DIR
See docs/models/mplug_video.md, "Recipe".
"""

from ml_collections import ConfigDict

from configs.mplug_video import recipe, slices
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict

PER_DEVICE = {"1.3b": 48, "2.7b": 32}


def get_config(arg: str = "1.3b") -> ConfigDict:
    """Settings by size, e.g. "1.3b" or "qwen2.5-1.5b,l14"; "1.3b@SLICE" adds the layout of a TPU slice."""
    arg, _, place = arg.partition("@")
    size = recipe.split_arg(arg)[0]
    experiment = Experiment(
        task="pretrain",
        model=recipe.model(arg),
        data=Data(examples=10_009_370),  # rows of the released pre-training table, for --mode=plan without shards
        optim=recipe.optim(1e-4, 1e-6, "2000 steps"),
        train=Train(
            batch_size=recipe.batch_size(PER_DEVICE, size),
            duration="10 epochs",
            save_every="2000 steps",
            eval_every="2000 steps",
        ),
    )
    return to_config_dict(slices.on(experiment, size, place) if place else experiment)
