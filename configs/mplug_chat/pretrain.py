"""Stage 1 of the chat model: the titles of clips through the frozen decoder, several clips with their titles in one row.

Use `configs/mplug_chat/pretrain.py:SIZE-PARTITION`, such as `:7b-adapters_abstractor` (the default). SIZE names the decoder: 7b (BLOOMZ-7B1),
bloomz-1b7, qwen2.5-1.5b, qwen2.5-7b, qwen3-1.7b, qwen3-8b. PARTITION names what is trained: adapters_abstractor, lora,
adapters_abstractor_lora, all_linears. `@SLICE` adds the layout of a TPU slice, see slices.py. Set the data and the weights on the command line:
    --config.data.path=SHARDS --config.data.tokenizer=tokenizer.json --config.train.init_from=llm=BLOOM_DIR,vision=CLIP_DIR
See docs/models/mplug_chat.md, "Recipe".
"""

from ml_collections import ConfigDict

from configs.mplug_chat import recipe, slices
from ymplug_jax.core.config import Experiment, Train, to_config_dict
from ymplug_jax.models.mplug_chat import PARTITIONS
from ymplug_jax.tasks.mplug_chat.pretrain import Options

PARTITION = "adapters_abstractor"


def get_config(arg: str = "7b-adapters_abstractor") -> ConfigDict:
    """Settings by size and partition, e.g. "7b-adapters_abstractor"; "7b-adapters_abstractor@SLICE" adds the layout of a TPU slice."""
    arg, _, place = arg.partition("@")
    size, partition = recipe.split_arg(arg, PARTITION)
    experiment = Experiment(
        task="mplug_chat_pretrain",
        model=recipe.model(size, partition),
        data=recipe.data(10_009_370),  # rows of the released pre-training table
        # mPLUG-Owl: lr 1e-4, weight decay 0.1, 2,000 steps of warm-up, then cosine. Its script was not released; the floor of the
        # schedule is that of its instruction tuning, 5 % of the peak.
        optim=recipe.optim(partition, lr=1e-4, min_lr=5e-6, warmup="2000 steps", weight_decay=0.1),
        train=Train(
            # mPLUG-Owl read 2.1 million tokens a step over 50,000 steps of 400 million pairs. Ten million titles are 900 million tokens,
            # so that batch would leave 400 steps an epoch. 64 full rows hold about 1,500 clips.
            batch_size=64,
            duration="3 epochs",
            save_every="1000 steps",
            eval_every="1000 steps",
            frozen=PARTITIONS[partition],
        ),
        options=Options(),
    )
    return to_config_dict(slices.on(experiment, size, place) if place else experiment)
