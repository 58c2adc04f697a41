"""Layouts of runs of mPLUG-2 on TPU slices; whether they fit is seen by `--mode compile`.

All parameters are trained, so on v5e and v6e the larger sizes are sharded over four chips, together with optimizer, teacher and queue.
The universal layers have no dropout on attention there: over 4,097 tokens it would keep attention out of the fused kernel, and
libtpu 0.0.42 overflows its stack when it compiles that for ViT-L/14. Negatives for matching come from the chip's own rows, as in the reference, so that no video is gathered. The batch size grows with the slice, but the learning rates of the recipe are for its own batches.
"""

import dataclasses
from typing import NamedTuple

from configs.mplug2 import recipe
from ymplug_jax.core.config import Experiment
from ymplug_jax.models.mplug2 import MPLUG2


class Layout(NamedTuple):
    """Layout of one slice: examples per chip in pre-training, and what the backward pass rematerialises."""

    topology: str
    chips: int
    batch: dict[str, int]  # size -> examples per chip in pre-training
    fsdp: dict[str, int]  # size -> chips that the parameters are sharded over; 1 for sizes that are not listed
    remat: str = "full"


PARTS = ("vision", "text", "universal", "fusion", "decoder")
SHARDED = {"youku-l14": 4, "large": 4}
SLICES = {
    "v5e-16": Layout("v5e:4x4", 16, dict.fromkeys(recipe.SIZES, 24), SHARDED),
    "v5p-64": Layout("v5p:4x4x4", 64, dict.fromkeys(recipe.SIZES, 32), {}, "dots"),
    "v6e-64": Layout("v6e:8x8", 64, dict.fromkeys(recipe.SIZES, 32), SHARDED),
}


def on(experiment: Experiment, size: str, name: str) -> Experiment:
    """Apply the layout of a slice to an experiment. Names count chips: "v5e-16" has 16 chips.

    Pre-training uses the batch size of the layout. Fine-tuning keeps the batch size of its recipe, rounded up to a multiple of the chips.

    Raises:
      ValueError: The slice is unknown.
    """
    if name not in SLICES:
        raise ValueError(f"unknown slice {name!r}; choose one of {', '.join(SLICES)}")
    layout, options = SLICES[name], experiment.options
    each = -(-experiment.train.batch_size // layout.chips)
    if experiment.task == "mplug2_pretrain":
        each = layout.batch[size]
    batch = each * layout.chips
    if getattr(options, "group", None) is not None:
        options = dataclasses.replace(options, group=_group(each))
    if getattr(options, "soft_ramp", 0):  # one epoch, in updates
        options = dataclasses.replace(options, soft_ramp=options.soft_ramp * experiment.train.batch_size // batch)
    return dataclasses.replace(
        experiment,
        model=_laid_out(experiment.model, layout.remat),
        train=dataclasses.replace(experiment.train, batch_size=batch),
        mesh=dataclasses.replace(experiment.mesh, fsdp=layout.fsdp.get(size, 1)),
        options=options,
    )


def _group(each: int) -> int:
    """Rows that share negatives: those of a chip, or of neighbouring chips if a chip has fewer than 8."""
    return next(each * n for n in (1, 2, 4, 8) if each * n >= 8)


def _laid_out(model: MPLUG2, remat: str) -> MPLUG2:
    parts = {name: getattr(model, name).clone(remat=remat) for name in PARTS}
    return model.clone(**parts | {"universal": parts["universal"].clone(attn_dropout=0.0)})
