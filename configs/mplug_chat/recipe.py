"""Settings shared by both stages of the chat model: sizes, trained partitions and the optimizer.

See docs/models/mplug_chat.md, "Recipe".
"""

from ymplug_jax.core.config import Data, Optim
from ymplug_jax.models import language_models, mplug_chat
from ymplug_jax.models.mplug_chat import MPLUGChat

# Argument -> decoder.
LLMS = {
    "7b": "bloomz-7b1",
    "bloomz-1b7": "bloomz-1b7",
    "qwen2.5-1.5b": "qwen2.5-1.5b",
    "qwen2.5-7b": "qwen2.5-7b",
    "qwen3-1.7b": "qwen3-1.7b",
    "qwen3-8b": "qwen3-8b",
}
# LoRA of mPLUG-Owl: alpha 32, so the update is multiplied by alpha / rank.
RANK, ALPHA, DROPOUT = 8, 32.0, 0.05
# No weight decay for biases and norms. The adapters of a decoder have neither, and every pattern must match a trained parameter.
NO_DECAY = (r".*/bias", r".*norm/scale")
LENGTH = 2048  # tokens of a row in both stages


def split_arg(arg: str, partition: str) -> tuple[str, str]:
    """Split an argument such as "7b-lora" or "qwen2.5-1.5b" into (size, partition).

    Args:
      arg: of the config.
      partition: of the stage, where the argument names none.

    Raises:
      ValueError: The size or the partition is unknown.
    """
    size, found = (arg, partition) if arg in LLMS else arg.rpartition("-")[::2]
    if size not in LLMS or found not in mplug_chat.PARTITIONS:
        raise ValueError(
            f"unknown argument {arg!r}; give SIZE-PARTITION with a size of {', '.join(LLMS)} and a partition of "
            f"{', '.join(mplug_chat.PARTITIONS)}"
        )
    return size, found


def model(size: str, partition: str) -> MPLUGChat:
    """The model of a size in bf16, with full rematerialisation, and with the adapters that the partition trains.

    The cls token of clips is not doubled: a run that starts from converted chat weights sets config.model.vision.double_cls=True.
    """
    made = MPLUGChat(llm=language_models.SIZES[LLMS[size]])
    computing = {"dtype": "bfloat16", "remat": "full"}
    llm = made.llm.clone(**computing)
    if targets := mplug_chat.LORA[partition]:
        llm = llm.clone(lora_rank=RANK, lora_scale=ALPHA / RANK, lora_dropout=DROPOUT, lora_targets=targets)
    return made.clone(vision=made.vision.clone(**computing), abstractor=made.abstractor.clone(**computing), llm=llm)


def optim(partition: str, *, lr: float, min_lr: float, warmup: str, weight_decay: float) -> Optim:
    """AdamW with a cosine schedule, as both stages use it."""
    return Optim(
        lr=lr,
        min_lr=min_lr,
        warmup=warmup,
        schedule="cosine",
        weight_decay=weight_decay,
        eps=1e-8,
        clip=1.0,
        no_decay=() if partition == "lora" else NO_DECAY,
    )


def data(examples: int) -> Data:
    """Data settings of both stages.

    Args:
      examples: Size of the training split, for --mode=plan without shards.
    """
    return Data(examples=examples, frames=4, max_tokens=LENGTH, augment=False)
