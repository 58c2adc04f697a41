"""Tiny stage 1 of the chat model for a laptop: titles of clips through a frozen decoder, as in configs/mplug_chat/pretrain.py."""

from ml_collections import ConfigDict

from configs.tiny import recipe
from ymplug_jax.tasks.mplug_chat.pretrain import Options


def get_config(partition: str = "vision") -> ConfigDict:
    """Settings by partition: "vision" (tower and abstractor), "vision_lora" or one of `mplug_chat.PARTITIONS`.

    Set --config.data.path, --config.data.tokenizer and --config.train.init_from=llm=DIR (a run of configs/tiny/chat_instruct.py:decoder).
    """
    return recipe.settings(
        "mplug_chat_pretrain",
        recipe.chat_model(partition),
        Options(videos_per_row=8),
        max_tokens=160,
        lr=2e-3,
        warmup="50 steps",
        no_decay=recipe.CHAT_NO_DECAY if partition != "lora" else (),
        batch_size=4,
        duration="1200 steps",
        every="400 steps",
        frozen=recipe.chat_frozen(partition),
        augment=False,
    )
