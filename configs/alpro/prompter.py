"""Training of ALPRO's prompter, the teacher of entity prediction: the contrastive loss only, with Salesforce's recipe.

Use `configs/alpro/prompter.py` with
    --config.data.path=SHARDS --config.data.tokenizer=vocab.txt --config.train.init_from=vision=VIT_DIR,text=BERT_DIR
    --config.options.prompts=prompts.json
where prompts.json comes from data_prep.entity_prompts; --mode=eval embeds it as the table of entities.
See docs/models/alpro.md, "Entity prompts".
"""

from ml_collections import ConfigDict

from configs.alpro import recipe
from configs.alpro.pretrain import EXAMPLES
from ymplug_jax.core.config import Data, Experiment, Train, to_config_dict
from ymplug_jax.models import alpro
from ymplug_jax.tasks.alpro.prompter import Options


def get_config(arg: str = "salesforce") -> ConfigDict:
    """Settings by variant and vision tower, which must be those of the model that it teaches."""
    experiment = Experiment(
        task="alpro_prompter",
        model=alpro.prompter_of(recipe.model(arg)),
        data=Data(examples=EXAMPLES, max_tokens=30),
        optim=recipe.salesforce_optim(1e-4, "5%", clip=20.0),
        train=Train(
            batch_size=16 * 8 * 2, accumulate=2, duration="10 epochs", save_every="2000 steps", eval_every="2000 steps"
        ),
        options=Options(),
    )
    return to_config_dict(experiment)
