"""Open-ended video QA with ALPRO, from a pre-trained run: read a question with 16 frames and choose an answer from a list.

Use `configs/alpro/answer.py` with
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt --config.options.answers=answers.txt
    --config.train.init_from=PRETRAINED_RUN
Build the shards with data_prep.build_shards --config question. For more than 1,500 answers, e.g. 2,423, set --config.model.classes=2423.
See docs/models/alpro.md, "Recipe".
"""

from ml_collections import ConfigDict

from configs.alpro import recipe
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.tasks.alpro.classify import Options


def get_config(arg: str = "salesforce") -> ConfigDict:
    """Settings by variant and vision tower, as Salesforce published them for MSRVTT-QA."""
    heads = {"contrastive_width": 0, "matching": False, "masked": False, "classes": 1500}
    experiment = Experiment(
        task="alpro_classify",
        model=recipe.model(arg, frames=16, **heads),
        data=Data(
            examples=158_581, frames=16, max_tokens=40, max_words=80
        ),  # size of MSRVTT-QA, for --mode=plan without shards
        optim=recipe.salesforce_optim(5e-5, "10%", clip=5.0),
        train=Train(batch_size=12 * 8 * 2, accumulate=2, duration="10 epochs"),
        options=Options(answers="answers.txt"),
    )
    return to_config_dict(experiment)
