"""Settings shared by all mPLUG-video runs: model sizes in bf16, parameter groups, and the optimizer of the published recipe.

See docs/models/mplug_video.md, "Recipe".
"""

from collections.abc import Mapping

from ymplug_jax.core.config import Optim
from ymplug_jax.models import mplug_video
from ymplug_jax.models.language_model import LanguageModel
from ymplug_jax.models.mplug_video import MPLUGVideo

# Language model -> the published size whose batch size a run uses.
LLMS = {
    "1.3b": "1.3b",
    "2.7b": "2.7b",
    "bloomz-1b7": "1.3b",
    "bloomz-7b1": "2.7b",
    "qwen2.5-1.5b": "1.3b",
    "qwen2.5-7b": "2.7b",
    "qwen3-1.7b": "1.3b",
    "qwen3-8b": "2.7b",
}
TINY = {"gpt3": "tiny", "bloom": "bloom-tiny", "qwen": "qwen-tiny"}  # argument of configs/tiny -> size
DEVICES = 8  # the recipe's batch sizes are per device, on eight devices
# No weight decay for one-dimensional tensors (norms, biases, extra key and value) and the vision tower's tables.
# Queries and temperature are decayed, as in the recipe.
NO_DECAY = (r".*/bias", r".*norm.*/scale", r"vision/(cls|pos_embed|temporal_embed)", r"abstractor/extra_(key|value)")
# CLIP weights use a tenth of the learning rate; the temporal parts are new and use the full rate.
CLIP_LR = ((r"vision/(?!.*temporal).*", 0.1),)


def split_arg(arg: str) -> tuple[str, str]:
    """Split an argument such as "1.3b", "2.7b,l14" or "qwen2.5-1.5b" into (llm, vision).

    Raises:
      ValueError: The size is unknown.
    """
    llm, _, vision = arg.partition(",")
    if llm not in LLMS:
        raise ValueError(f"unknown size {llm!r}; choose one of {', '.join(LLMS)}, each also as SIZE,l14")
    return llm, vision or "b16"


def batch_size(per_device: Mapping[str, int], size: str) -> int:
    """Global batch size of the published run of a size, or of the nearest published run."""
    return DEVICES * per_device[LLMS[size]]


def tiny(llm: str) -> str:
    """Size of the tiny language model of a kind.

    Raises:
      ValueError: The kind is unknown.
    """
    if llm not in TINY:
        raise ValueError(f"unknown language model {llm!r}; choose one of {', '.join(TINY)}")
    return TINY[llm]


def with_dropout(llm: LanguageModel, rate: float) -> LanguageModel:
    """The decoder with the given dropout rate; BLOOM and Qwen have no dropout and are returned unchanged."""
    return llm.clone(dropout=rate) if hasattr(llm, "dropout") else llm


def model(arg: str, **heads: int) -> MPLUGVideo:
    """The model of a size, in bf16 and with full rematerialisation; `heads` as for `mplug_video.sized`."""
    made = mplug_video.sized(*split_arg(arg), **heads)
    return made.clone(
        vision=made.vision.clone(dtype="bfloat16", remat="full"),
        abstractor=made.abstractor.clone(dtype="bfloat16"),
        # The published runs kept dropout inside the frozen GPT-3; 0.0 is the cleaner choice for new runs.
        llm=with_dropout(made.llm.clone(dtype="bfloat16", remat="full"), 0.1),
    )


def optim(lr: float, min_lr: float, warmup: str, eps: float = 1e-6, no_decay: tuple[str, ...] = NO_DECAY) -> Optim:
    """AdamW of the recipe with the learning rates of a task."""
    return Optim(lr=lr, min_lr=min_lr, warmup=warmup, eps=eps, no_decay=no_decay, lr_scales=CLIP_LR)
