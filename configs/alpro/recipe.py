"""Settings shared by all ALPRO runs: model sizes in bf16, parameter groups, and the recipes of both variants.

Youku-mPLUG released ALPRO's model classes without a recipe, so the values of variant "youku" are assumed from the YAML files of the
models released with it. The values of variant "salesforce" are published. See docs/models/alpro.md, "Recipe".
"""

from ymplug_jax.core.config import Optim
from ymplug_jax.models import alpro
from ymplug_jax.models.alpro import ALPRO

DEVICES = 8  # Youku's batch sizes are per device, on eight devices
SIZES = ("b16", "clip_b16", "clip_l14")
# No weight decay for one-dimensional tensors, the vision tower's tables, and the temperature (which the reference decays).
NO_DECAY = (r".*/bias", r".*norm.*/scale", r"vision/(cls|pos_embed|temporal_embed)", "temperature")
# CLIP weights use a tenth of the learning rate; the temporal parts are new and use the full rate.
CLIP_LR = ((r"vision/(?!.*temporal).*", 0.1),)


def split_arg(arg: str) -> tuple[str, str]:
    """Split an argument such as "youku", "youku,clip_b16" or "salesforce" into (variant, vision).

    Raises:
      ValueError: The variant or the vision tower is unknown.
    """
    variant, _, vision = arg.partition(",")
    vision = vision or "b16"
    if variant not in alpro.VARIANTS or vision not in SIZES:
        raise ValueError(
            f"unknown variant {arg!r}; choose one of {', '.join(alpro.VARIANTS)}, each also as VARIANT,clip_b16 or VARIANT,clip_l14"
        )
    return variant, vision


def model(arg: str, **heads) -> ALPRO:
    """The model of an argument, in bf16 and with full rematerialisation; `heads` as for `alpro.sized`."""
    variant, vision = split_arg(arg)
    made = alpro.sized(vision, variant=variant, **heads)
    kind = {"dtype": "bfloat16", "remat": "full"}
    return made.clone(vision=made.vision.clone(**kind), text=made.text.clone(**kind), fusion=made.fusion.clone(**kind))


def optim(
    lr: float,
    min_lr: float,
    warmup: str,
    *,
    eps: float = 1e-6,
    clip: bool = False,
    no_decay: tuple[str, ...] = NO_DECAY,
) -> Optim:
    """Youku's AdamW with the learning rates of a task (assumed); `clip`: the vision tower comes from CLIP."""
    return Optim(lr=lr, min_lr=min_lr, warmup=warmup, eps=eps, no_decay=no_decay, lr_scales=CLIP_LR if clip else ())


def salesforce_optim(lr: float, warmup: str, clip: float) -> Optim:
    """Salesforce's AdamW, without weight decay: its configs set one, but the optimizer never received it."""
    return Optim(lr=lr, min_lr=1e-8, warmup=warmup, schedule="bert", weight_decay=0.0, b2=0.98, eps=1e-6, clip=clip)
