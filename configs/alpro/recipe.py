"""What all runs of ALPRO share: model sizes in bf16, parameter groups, and the two recipes.

Youku-mPLUG has published ALPRO's classes and no recipe: the values of variant "youku" are assumed, from the YAML files of the
models that it was released with. Those of variant "salesforce" are published.
"""

from ymplug_jax.core.config import Optim
from ymplug_jax.models import alpro
from ymplug_jax.models.alpro import ALPRO

DEVICES = 8  # Youku's batches are per device of eight
SIZES = ("b16", "clip_b16", "clip_l14")
# No decay for one-dimensional tensors, the vision tower's own tables, and the temperature (which the reference decays).
NO_DECAY = (r".*/bias", r".*norm.*/scale", r"vision/(cls|pos_embed|temporal_embed)", "temperature")
# What came from CLIP learns at a tenth of the rate; temporal parts are new and learn at the full rate.
CLIP_LR = ((r"vision/(?!.*temporal).*", 0.1),)


def split_arg(arg: str) -> tuple[str, str]:
    """(variant, vision) of "youku", "youku,clip_b16", "youku,clip_l14", "salesforce".

    Raises:
      ValueError: an unknown variant or size.
    """
    variant, _, vision = arg.partition(",")
    vision = vision or "b16"
    if variant not in alpro.VARIANTS or vision not in SIZES:
        raise ValueError(
            f"{arg!r} is unknown; there are {', '.join(alpro.VARIANTS)}, each also as VARIANT,clip_b16 or clip_l14"
        )
    return variant, vision


def model(arg: str, **heads) -> ALPRO:
    """The model of an argument in bf16, every layer recomputed in the backward pass; `heads` as for `alpro.sized`."""
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
    """Youku's AdamW with a task's own rates (assumed); `clip`: the vision tower comes from CLIP."""
    return Optim(lr=lr, min_lr=min_lr, warmup=warmup, eps=eps, no_decay=no_decay, lr_scales=CLIP_LR if clip else ())


def salesforce_optim(lr: float, warmup: str, clip: float) -> Optim:
    """Salesforce's AdamW: its configs ask for decay, which never reached the optimizer."""
    return Optim(lr=lr, min_lr=1e-8, warmup=warmup, schedule="bert", weight_decay=0.0, b2=0.98, eps=1e-6, clip=clip)
