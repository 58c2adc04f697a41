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
