"""Pre-training of ALPRO on video-title pairs: contrastive, matching, masked words; variant "salesforce" adds entities.

Use `configs/alpro/pretrain.py:youku` or `:salesforce`, with the vision tower after a comma: `:youku,clip_b16`, `:youku,clip_l14`. Set
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt
    --config.train.init_from=vision=VIT_DIR,text=BERT_DIR,fusion=BERT_DIR,mlm=BERT_DIR
Salesforce initialises temporal attention from spatial attention: add to init_from vision/blocks/temporal_attn:vision/blocks/attn=VIT_DIR
and vision/blocks/temporal_norm:vision/blocks/attn_norm=VIT_DIR.
For entities, add `prompter:=PROMPTER_RUN` to init_from and set --config.options.entities=PROMPTER_RUN/eval/validation/index.npz.
For batches of still images as well, set --config.model.stills=True --config.data.path=IMAGES,SHARDS --config.data.weights="(1, 1)".
For the released English models, with a vocabulary of 30,522, set --config.model.text.vocab=30522.
See docs/models/alpro.md, "Recipe".
"""

from ml_collections import ConfigDict

from configs.alpro import recipe
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.tasks.alpro.pretrain import Options

EXAMPLES = 10_009_370  # rows of the released pre-training table, for --mode=plan without shards


def get_config(arg: str = "youku") -> ConfigDict:
    """Settings by variant and vision tower."""
    variant, vision = recipe.split_arg(arg)
    if variant == "youku":
        experiment = Experiment(
            task="alpro_pretrain",
            model=recipe.model(arg),
            data=Data(examples=EXAMPLES),
            # Learning rates, batch size, warm-up and masked share are not published but assumed.
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
