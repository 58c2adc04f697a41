"""Stage 2 of the chat model: tuning on conversations with clips, images or text only, several of them in one row.

Use `configs/mplug_chat/instruct.py:SIZE-PARTITION`, such as `:7b-lora` (the default); sizes, partitions and slices as in pretrain.py. With
    --config.data.path=VIDEO,IMAGE,TEXT --config.data.tokenizer=tokenizer.json --config.train.init_from=STAGE_1
The published weights count the cls token of clips twice: from a conversion of them, also set --config.model.vision.double_cls=True.
See docs/models/mplug_chat.md, "Recipe".
"""

from ml_collections import ConfigDict

from configs.mplug_chat import recipe, slices
from ymplug_jax.core.config import Experiment, Train, to_config_dict
from ymplug_jax.models.mplug_chat import PARTITIONS
from ymplug_jax.tasks.mplug_chat.instruct import Options

PARTITION = "lora"


def get_config(arg: str = "7b-lora") -> ConfigDict:
    """Settings by size and partition, e.g. "7b-lora"; "7b-lora@SLICE" adds the layout of a TPU slice."""
    arg, _, place = arg.partition("@")
    size, partition = recipe.split_arg(arg, PARTITION)
    experiment = Experiment(
        task="mplug_chat_instruct",
        model=recipe.model(size, partition),
        data=recipe.data(361_481),  # conversations that mPLUG-Owl was tuned on
        # The published script decays linearly to 0, because its cosine schedule is never used. Warm-up and cosine to 1e-6 are what it
        # and the older script of the same model state, so they are used here; --config.optim.schedule=linear restores the other.
        optim=recipe.optim(partition, lr=2e-5, min_lr=1e-6, warmup="50 steps", weight_decay=1e-4),
        train=Train(
            # The intended batch of the published script; one node of eight GPUs gave 32 with its flags. A row here holds several
            # conversations, so a step reads more of them.
            batch_size=256,
            duration="3 epochs",
            save_every="200 steps",
            eval_every="200 steps",
            frozen=PARTITIONS[partition],
        ),
        options=Options(),
    )
    return to_config_dict(slices.on(experiment, size, place) if place else experiment)
