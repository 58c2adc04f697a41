"""Tiny stage 2 of the chat model for a laptop: conversations about clips, images and text, as in configs/mplug_chat/instruct.py."""

from ml_collections import ConfigDict

from configs.tiny import recipe
from ymplug_jax.tasks.mplug_chat.instruct import Options


def get_config(partition: str = "vision") -> ConfigDict:
    """Settings by partition.

    "vision" (tower and abstractor), "vision_lora", "adapters_abstractor", "lora", "adapters_abstractor_lora" and "all_linears" start from a run
    of configs/tiny/chat_pretrain.py, --config.train.init_from=DIR. "decoder" trains the language model alone on rows of text, before the first
    stage, and starts from a run of configs/tiny/language.py:bloom, --config.train.init_from=llm=DIR. Also set --config.data.path and
    --config.data.tokenizer.
    """
    text = partition == "decoder"
    return recipe.settings(
        "mplug_chat_instruct",
        recipe.chat_model(partition),
        Options(0 if text else 1, 0 if text else 4, new_tokens=12, choices=0),
        max_tokens=256,
        lr=3e-3 if text else 2e-3,
        warmup="50 steps",
        no_decay=recipe.CHAT_NO_DECAY if partition != "lora" else (),
        batch_size=8,
        duration="2000 steps" if text else "1200 steps",
        every="400 steps",
        frozen=recipe.chat_frozen(partition),
        augment=False,
    )
