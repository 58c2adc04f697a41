"""Settings shared by all tiny runs: 4 frames of 64 pixels and an optimizer for short runs."""

from typing import Any

from ml_collections import ConfigDict

from configs.mplug_video import recipe
from ymplug_jax.core.config import Data, Experiment, Optim, Train, to_config_dict
from ymplug_jax.models import clip_vit, language_models, mplug_chat
from ymplug_jax.models.mplug_chat import MPLUGChat
from ymplug_jax.models.query_abstractor import QueryAbstractor

# Frozen parameters of the partitions that only a model without converted weights needs: "vision" and
# "vision_lora" also train the tower, as there are no CLIP weights of this size; "decoder" trains the language model alone, on rows of text.
CHAT_DECODER = {"width": 64, "depth": 2}  # smaller than that of the other tiny configs, because texts are longer
CHAT_NO_DECAY = (r".*/bias", r".*norm.*/scale")
CHAT_PARTITIONS = {
    "vision": ("llm/.*",),
    "vision_lora": (r"llm/(?!blocks/lora/).*",),
    "decoder": ("vision/.*", "abstractor/.*"),
}


def settings(
    task: str,
    model: Any,
    options: Any = None,
    *,
    max_tokens: int = 40,
    lr: float = 3e-4,
    warmup: str = "30 steps",
    no_decay: tuple[str, ...] = recipe.NO_DECAY,
    batch_size: int = 16,
    duration: str = "500 steps",
    every: str = "500 steps",
    frozen_dtype: str = "float32",
    frozen: tuple[str, ...] | None = None,
    augment: bool = True,
) -> ConfigDict:
    """Settings of a tiny run.

    Args:
      task: Name of the task.
      model: A linen module.
      options: Options of the task; None: the task's defaults.
      max_tokens: Tokens per text.
      lr: Peak learning rate.
      warmup: Duration of the warm-up from 0 to the peak.
      no_decay: Path patterns of the parameters without weight decay.
      batch_size: Global batch size.
      duration: Duration of the run.
      every: Interval of checkpoints and of evaluations.
      frozen_dtype: Dtype of the frozen parameters.
      frozen: Path patterns of the frozen parameters; None: the task's default.
      augment: Augment frames in training.
    """
    experiment = Experiment(
        task=task,
        model=model,
        data=Data(frames=4, image_size=64, max_tokens=max_tokens, augment=augment, threads=2),
        optim=Optim(lr=lr, min_lr=1e-5, warmup=warmup, clip=1.0, no_decay=no_decay),
        train=Train(
            batch_size=batch_size,
            duration=duration,
            log_every="20 steps",
            save_every=every,
            eval_every=every,
            frozen=frozen,
            frozen_dtype=frozen_dtype,
        ),
        **({} if options is None else {"options": options}),
    )
    return to_config_dict(experiment)


def chat_model(partition: str) -> MPLUGChat:
    """The tiny chat model, with the adapters that a partition trains.

    The tower starts from random weights at a small width, so its initial weights are larger than CLIP's and keep activations near 1.
    """
    model = MPLUGChat(
        vision=clip_vit.SIZES["tiny"].clone(depth=3, std=0.12, table_std=1.0),
        abstractor=QueryAbstractor(queries=8, depth=2, heads=4, mlp=128, dropout=0.0, std=0.12),
        llm=language_models.SIZES[recipe.TINY["bloom"]].clone(**CHAT_DECODER),
    )
    adapters = {"vision_lora": mplug_chat.LORA["lora"], **mplug_chat.LORA}
    if targets := adapters.get(partition, ()):
        model = model.clone(llm=model.llm.clone(lora_rank=8, lora_scale=4.0, lora_targets=targets))
    return model


def chat_frozen(partition: str) -> tuple[str, ...]:
    """Frozen parameters of a partition of the tiny chat model: one of `mplug_chat.PARTITIONS`, or of `CHAT_PARTITIONS`.

    Raises:
      ValueError: The partition is unknown.
    """
    known = CHAT_PARTITIONS | mplug_chat.PARTITIONS
    if partition not in known:
        raise ValueError(f"unknown partition {partition!r}; choose one of {', '.join(known)}")
    return known[partition]
