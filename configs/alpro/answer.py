"""Open-ended video QA with ALPRO, from a pre-trained run: the question is read with 16 frames, the answer is one of a list.

`configs/alpro/answer.py`, with
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt --config.options.answers=answers.txt
    --config.train.init_from=PRETRAINED_RUN
Shards of questions: data_prep.build_shards --config question. More than 1,500 answers: --config.model.classes=2423.
"""

from ml_collections import ConfigDict

from configs.alpro import recipe
from ymplug_jax.core.config import Data, Experiment, Options, Train, to_config_dict


def get_config(arg: str = "salesforce") -> ConfigDict:
    """Settings by variant and vision tower: Salesforce's for MSRVTT-QA."""
    heads = {"contrastive_width": 0, "matching": False, "masked": False, "classes": 1500}
    experiment = Experiment(
        task="alpro_classify",
        model=recipe.model(arg, frames=16, **heads),
        data=Data(examples=158_581, frames=16, max_tokens=40, max_words=80),  # questions of MSRVTT-QA, for --mode=plan
        optim=recipe.salesforce_optim(5e-5, "10%", clip=5.0),
        train=Train(batch_size=12 * 8 * 2, accumulate=2, duration="10 epochs"),
        options=Options(answers="answers.txt"),
    )
    return to_config_dict(experiment)
