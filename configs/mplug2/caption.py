"""Captioning with mPLUG-2, from a pre-trained run or converted weights: 16 frames, beam search with 5 beams.

Use `configs/mplug2/caption.py:large` (MSRVTT), `:large-msvd`, `:large-youku`, the same with base, `:youku-b16` or `:youku-l14` with
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt --config.train.init_from=PRETRAINED_RUN
Build the shards with data_prep.build_shards --config captioning. MSRVTT and MSVD have the 30,522 words of English BERT and the published
values; Youku has the 21,128 words of Chinese BERT and assumed values. See docs/models/mplug2.md, "Recipes of generation".
"""

from ml_collections import ConfigDict

from configs.mplug2 import recipe, slices
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.models import mplug2
from ymplug_jax.tasks.mplug2.caption import Options

# Captions of the training split by data set (of Youku approximately), for --mode=plan without shards.
EXAMPLES = {"msrvtt": 140_200, "msvd": 48_774, "youku": 171_000}
BEST = {"eval_scores_every": "1 epochs", "best": "cider"}  # how the released models were selected


def get_config(arg: str = "large") -> ConfigDict:
    """Settings by size and data set, e.g. "large" or "large-msvd"; "large@SLICE" adds the layout of a TPU slice."""
    arg, _, place = arg.partition("@")
    size, data = recipe.split_arg(arg)
    youku = data == "youku"
    model = recipe.model(size, frames=16, vocab=0 if youku else mplug2.ENGLISH, reads=False)
    english = Options(prompt="a video of", language="en")
    experiment = Experiment(
        task="mplug2_caption",
        model=model,
        data=Data(examples=EXAMPLES[data], frames=16, max_tokens=80 if youku else 20, max_words=80),
        optim=recipe.optim(model, 2e-5, 1e-6, "100 steps") if youku else recipe.tuning_optim(model),
        train=Train(batch_size=recipe.DEVICES * 24 if youku else 64, duration="10 epochs", **({} if youku else BEST)),
        options=Options(new_tokens=80) if youku else english,
    )
    return to_config_dict(slices.on(experiment, size, place) if place else experiment)
