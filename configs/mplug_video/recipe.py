"""What all runs of mPLUG-video share: model sizes in bf16, parameter groups, the optimizer of the published recipe."""

from ymplug_jax.core.config import Optim
from ymplug_jax.models import mplug_video
from ymplug_jax.models.mplug_video import MPLUGVideo

LLMS = ("1.3b", "2.7b")
DEVICES = 8  # the recipe's batches are per device of eight
# No decay for one-dimensional tensors (norms, biases, extra key and value) and the vision tower's own tables.
# Queries and temperature do decay, as in the recipe.
NO_DECAY = (r".*/bias", r".*norm.*/scale", r"vision/(cls|pos_embed|temporal_embed)", r"abstractor/extra_(key|value)")
# What came from CLIP learns at a tenth of the rate; temporal parts are new and learn at the full rate.
CLIP_LR = ((r"vision/(?!.*temporal).*", 0.1),)


def split_arg(arg: str) -> tuple[str, str]:
    """(llm, vision) of "1.3b", "2.7b", "1.3b,l14", "2.7b,l14".

    Raises:
      ValueError: an unknown size.
    """
    llm, _, vision = arg.partition(",")
    if llm not in LLMS:
        raise ValueError(f"size {llm!r} is unknown; there are {', '.join(LLMS)}, each also as SIZE,l14")
    return llm, vision or "b16"


def model(arg: str, **heads) -> MPLUGVideo:
    """The model of a size, in bf16, every layer recomputed in the backward pass; `heads` as for `mplug_video.sized`."""
    made = mplug_video.sized(*split_arg(arg), **heads)
    return made.clone(
        vision=made.vision.clone(dtype="bfloat16", remat="full"),
        abstractor=made.abstractor.clone(dtype="bfloat16"),
        # The published runs left dropout on inside the frozen decoder; 0.0 is the cleaner choice for a run of your own.
        llm=made.llm.clone(dtype="bfloat16", remat="full", dropout=0.1),
    )


def optim(lr: float, min_lr: float, warmup: str, eps: float = 1e-6, no_decay: tuple[str, ...] = NO_DECAY) -> Optim:
    """AdamW of the recipe with a task's own rates."""
    return Optim(lr=lr, min_lr=min_lr, warmup=warmup, eps=eps, no_decay=no_decay, lr_scales=CLIP_LR)
