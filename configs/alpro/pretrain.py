"""Pre-training of ALPRO on video-title pairs: contrastive, matching, masked words; variant "salesforce" with entities.

`configs/alpro/pretrain.py:youku` or `:salesforce`, and the vision tower after a comma: `:youku,clip_b16`, `:youku,clip_l14`. With
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt
    --config.train.init_from=vision=VIT_DIR,text=BERT_DIR,fusion=BERT_DIR,mlm=BERT_DIR
(Salesforce starts attention over time from that over space: there also vision/blocks/temporal_attn:vision/blocks/attn=VIT_DIR and
vision/blocks/temporal_norm:vision/blocks/attn_norm=VIT_DIR.)
and for entities also `prompter:=PROMPTER_RUN` there and --config.options.entities=PROMPTER_RUN/eval/validation/index.npz.
The released English models have 30,522 words: --config.model.text.vocab=30522.
"""

from ml_collections import ConfigDict

from configs.alpro import recipe
from ymplug_jax.core.config import Data, Experiment, Options, Train, to_config_dict

EXAMPLES = 10_009_370  # rows of the released pre-training table, for --mode=plan without shards


def get_config(arg: str = "youku") -> ConfigDict:
    """Settings by variant and vision tower."""
    variant, vision = recipe.split_arg(arg)
    if variant == "youku":
        experiment = Experiment(
            task="alpro_pretrain",
            model=recipe.model(arg),
            data=Data(examples=EXAMPLES),
            # All of it assumed: rates, batch, warm-up; the share of masked words as well.
            optim=recipe.optim(1e-4, 1e-6, "2000 steps", clip=vision != "b16"),
            train=Train(
                batch_size=recipe.DEVICES * 48, duration="10 epochs", save_every="2000 steps", eval_every="2000 steps"
            ),
            options=Options(group=48),
        )
    else:
        experiment = Experiment(
            task="alpro_pretrain",
            model=recipe.model(arg, entities=1000),
            data=Data(examples=EXAMPLES, max_tokens=30),
            optim=recipe.salesforce_optim(1e-4, "5%", clip=20.0),
            train=Train(batch_size=16 * 16, duration="10 epochs", save_every="2000 steps", eval_every="2000 steps"),
            options=Options(group=16),
        )
    return to_config_dict(experiment)
