"""Pre-training of mPLUG-2 on video-title pairs.

Use `configs/mplug2/pretrain.py:youku-b16`, `:youku-l14`, `:base` or `:large` with
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt
    --config.train.init_from=vision=CLIP_DIR,text=BERT_DIR,fusion=BERT_DIR,decoder=BERT_DIR,mlm=BERT_DIR
BERT_DIR comes from `ymplug_jax.convert --model bert_mplug2`. CLIP_DIR comes from `--model clip` for the sizes with "youku" and from
`--model clip_mplug2` for `:base` and `:large`. These two also take universal=BERT_DIR; for `:base` convert BERT with --heads universal=2.
docs/models/mplug2.md, "Initialisation", lists the files.
`@SLICE` adds the layout and batch size for a TPU slice: `:large@v5e-16`; see slices.py.
All values are assumed, see docs/models/mplug2.md, "Recipe".
"""

from ml_collections import ConfigDict

from configs.mplug2 import recipe, slices
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.tasks.mplug2.pretrain import Options

EXAMPLES = 10_009_370  # rows of the released pre-training table, for --mode=plan without shards
QUEUE = 65_664  # rows: a multiple of the batch, near the 65,536 of the models before it


def get_config(arg: str = "youku-b16") -> ConfigDict:
    """Settings by size; sizes without "youku" have no teacher, and half of their examples follow an instruction."""
    arg, _, place = arg.partition("@")
    youku, large = arg.startswith("youku"), arg in ("youku-l14", "large")
    batch = recipe.DEVICES * 48
    parts = {"contrastive_width": 256, "matching": True, "masked": True}
    options = (
        Options(momentum=True, queue=QUEUE, soft_ramp=EXAMPLES // batch)
        if youku
        else Options(instruction="描述这个视频")
    )
    model = recipe.model(arg, frames=4, **parts)
    experiment = Experiment(
        task="mplug2_pretrain",
        model=model,
        data=Data(examples=EXAMPLES),
        optim=recipe.optim(model, 5e-5 if large else 1e-4, 1e-6, "2000 steps"),
        train=Train(batch_size=batch, duration="10 epochs", save_every="2000 steps", eval_every="2000 steps"),
        options=options,
    )
    return to_config_dict(slices.on(experiment, arg, place) if place else experiment)
