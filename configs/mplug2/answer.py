"""Video question answering with mPLUG-2, from a pre-trained run or converted weights: 16 frames, generated answers or a closed list.

Use `configs/mplug2/answer.py:large` (MSRVTT-QA), `:large-msvd`, `:large-youku`, the same with base, `:youku-b16` or `:youku-l14` with
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt --config.train.init_from=PRETRAINED_RUN
Build the shards with data_prep.build_shards --config question. --config.options.answers=answers.txt ranks the answers of that file instead
of generating one. MSRVTT-QA and MSVD-QA have the 30,522 words of English BERT and the published values; "youku" stands for Chinese
questions, with the 21,128 words of Chinese BERT and assumed values. See docs/models/mplug2.md, "Recipes of generation".
"""

from ml_collections import ConfigDict

from configs.mplug2 import recipe, slices
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.models import mplug2
from ymplug_jax.tasks.mplug2.answer import Options

# Questions of the training split by data set, for --mode=plan without shards; there is no Chinese set of that size.
EXAMPLES = {"msrvtt": 158_581, "msvd": 30_933, "youku": 100_000}
BEST = {"eval_scores_every": "1 epochs", "best": "exact"}  # how the released models were selected


def get_config(arg: str = "large") -> ConfigDict:
    """Settings by size and data set, e.g. "large" or "large-msvd"; "large@SLICE" adds the layout of a TPU slice."""
    arg, _, place = arg.partition("@")
    size, data = recipe.split_arg(arg)
    youku = data == "youku"
    model = recipe.model(size, frames=16, vocab=0 if youku else mplug2.ENGLISH)
    experiment = Experiment(
        task="mplug2_answer",
        model=model,
        data=Data(examples=EXAMPLES[data], frames=16, max_tokens=50, max_words=80),
        optim=recipe.optim(model, 2e-5, 1e-6, "100 steps") if youku else recipe.tuning_optim(model),
        train=Train(batch_size=32, duration="10 epochs", **({} if youku else BEST)),
        options=Options(),
    )
    return to_config_dict(slices.on(experiment, size, place) if place else experiment)
