"""Settings shared by all mPLUG-2 runs: model sizes in bf16 and parameter groups.

Neither variant was published with a recipe for pre-training. See docs/models/mplug2.md, "Recipe".
"""

from typing import Any

from ymplug_jax.core.config import Optim
from ymplug_jax.models import mplug2
from ymplug_jax.models.mplug2 import MPLUG2

DEVICES = 8  # Youku's batch sizes are per device, on eight devices
SIZES = ("youku-b16", "youku-l14", "base", "large")
_NO_DECAY = (r".*/bias", r".*norm.*/scale", "temperature")
# No weight decay for one-dimensional tensors, tables of the vision tower, latents, and the temperature; by variant.
NO_DECAY = {
    "mplug_youku": (*_NO_DECAY, "vision/(cls|pos_embed|temporal_embed)"),
    "mplug2": (*_NO_DECAY, "vision/(cls|pos_embed)", "universal/latents"),
}
# CLIP weights use a tenth of the learning rate; the temporal parts are new and use the full rate.
CLIP_LR = ((r"vision/(?!.*temporal).*", 0.1),)
VISION_LR = (("vision/.*", 0.1),)  # of the released recipes: the whole vision tower, temporal modules included
UNCLIPPED = 1e9  # the released recipes clip no gradient: a norm that no usable step reaches
DATA = ("msrvtt", "msvd", "youku")  # data sets of fine-tuning; the first two are English


def model(size: str, *, frames: int, **parts: Any) -> MPLUG2:
    """The model of a size, in bf16 and with full rematerialisation; `parts` as for `mplug2.sized`.

    Raises:
      ValueError: The size is unknown.
    """
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; choose one of {', '.join(SIZES)}")
    made = mplug2.sized(size, frames=frames, **parts)
    kind = {"dtype": "bfloat16", "remat": "full"}
    inner = {name: getattr(made, name).clone(**kind) for name in ("vision", "text", "universal", "fusion", "decoder")}
    return made.clone(**inner)


def tiny(variant: str) -> str:
    """The tiny size of a variant.

    Raises:
      ValueError: The variant is unknown.
    """
    sizes = {"mplug_youku": "youku-tiny", "mplug2": "tiny"}
    if variant not in sizes:
        raise ValueError(f"unknown variant {variant!r}; choose one of {', '.join(mplug2.VARIANTS)}")
    return sizes[variant]


def no_decay(model: MPLUG2) -> tuple[str, ...]:
    """Patterns of the parameters without weight decay; each matches a parameter of the model."""
    return tuple(path for path in NO_DECAY[model.variant] if path != "temperature" or model.contrastive_width)


def optim(model: MPLUG2, lr: float, min_lr: float, warmup: str, *, eps: float = 1e-6) -> Optim:
    """AdamW with two learning rates."""
    return Optim(lr=lr, min_lr=min_lr, warmup=warmup, eps=eps, no_decay=no_decay(model), lr_scales=CLIP_LR)


def split_arg(arg: str) -> tuple[str, str]:
    """Split an argument of fine-tuning such as "large", "large-msvd" or "youku-b16" into (size, data set).

    Without a data set, sizes with "youku" get Youku's and all others MSRVTT. English has 30,522 words, so a size with "youku", which is
    Chinese, has no English data set.

    Raises:
      ValueError: The size or the data set is unknown.
    """
    chinese = arg.startswith("youku")
    size, _, data = (arg, "", "youku") if chinese else arg.partition("-")
    if size not in SIZES or (data or DATA[0]) not in DATA:
        sizes = ", ".join(size for size in SIZES if not size.startswith("youku"))
        raise ValueError(
            f"unknown argument {arg!r}; choose youku-b16, youku-l14, or one of {sizes}, each also as SIZE-DATA with DATA one of {', '.join(DATA)}"
        )
    return size, data or DATA[0]


def tuning_optim(model: MPLUG2) -> Optim:
    """AdamW of fine-tuning, as published with the released models."""
    return Optim(
        lr=2e-5,
        min_lr=1e-6,
        warmup="200 steps",
        schedule="mplug2",
        warmup_lr=1e-6,
        weight_decay=0.02,
        eps=1e-8,
        clip=UNCLIPPED,
        no_decay=no_decay(model),
        lr_scales=VISION_LR,
    )
