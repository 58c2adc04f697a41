"""Layouts of runs on TPU slices, tuned with `--mode compile`.

The frozen decoder in bf16 (2.6 or 5.3 GB) fits on every chip, so it is replicated and chips exchange only the gradient of the trained
parameters. The batch size grows with the slice, but the learning rates of the recipe are for batches of 384 and 256.

The frozen decoder runs without the recipe's dropout, which draws a random number per attention weight and prevents a fused attention
kernel. `--config.model.llm.dropout=0.1` restores it.
"""

import dataclasses
from typing import NamedTuple

from configs.mplug_video import recipe
from ymplug_jax.core.config import Experiment
from ymplug_jax.tasks.mplug_video import match


class Layout(NamedTuple):
    """Layout of one slice: batch size per chip, and what the backward pass rematerialises.

    The decoder saves its matrix products ("dots") and rematerialises the rest, unless a run is listed in `whole`.
    """

    topology: str
    chips: int
    batch: dict[str, int]  # size -> examples per chip in pre-training
    vision_remat: str
    frozen_dtype: str = "bfloat16"
    whole: tuple[str, ...] = ()  # "task size" of runs that must rematerialise the whole decoder
    most: dict[str, int] = {}  # "task size" -> examples per chip in fine-tuning, if the recipe's do not fit

    def sizes(self, task: str) -> list[str]:
        """Sizes with a layout for a task; fine-tuning has layouts only for the published sizes."""
        return [size for size in self.batch if task == "pretrain" or size in ("1.3b", "2.7b")]


# Sizes without a published run have been compiled only for pre-training on v5e: they use 7.4 (Qwen2.5-1.5B) and 7.9 (BLOOMZ-1B7) of
# 15.75 GiB per chip.
NEW = {"qwen2.5-1.5b": 24, "bloomz-1b7": 24}
NEW_WHOLE = tuple(f"pretrain {size}" for size in NEW)
SLICES = {
    "v5e-16": Layout(
        *("v5e:4x4", 16, {"1.3b": 32, "2.7b": 16, **NEW}, "full"),
        whole=("classify 2.7b", "caption 2.7b", "match 1.3b", "match 2.7b", *NEW_WHOLE),
        most={"match 1.3b": 24, "match 2.7b": 16},
    ),
    "v5e-64": Layout(
        "v5e:8x8", 64, {"1.3b": 32, "2.7b": 16, **NEW}, "full", whole=("match 1.3b", "match 2.7b", *NEW_WHOLE)
    ),
    # An int8 decoder leaves room for larger batches or a larger vision tower.
    "v5e-16-int8": Layout("v5e:4x4", 16, {"1.3b": 40, "2.7b": 24}, "full", "int8"),
    "v5p-64": Layout("v5p:4x4x4", 64, {"1.3b": 32, "2.7b": 32}, "dots"),
    "v5p-256": Layout("v5p:4x8x8", 256, {"1.3b": 32, "2.7b": 32}, "dots"),
    "v6e-64": Layout("v6e:8x8", 64, {"1.3b": 32, "2.7b": 32}, "full"),
}


def on(experiment: Experiment, size: str, name: str) -> Experiment:
    """Apply the layout of a slice to an experiment. Names count chips: "v5p-256" has 256 chips.

    Pre-training uses the batch size of the layout. Fine-tuning keeps the batch size of its recipe, rounded up to a multiple of
    the chips, or uses the largest that fits.

    Raises:
      ValueError: The slice is unknown or has no layout for the size.
    """
    if name not in SLICES:
        raise ValueError(f"unknown slice {name!r}; choose one of {', '.join(SLICES)}")
    layout, model, run = SLICES[name], experiment.model, f"{experiment.task} {size}"
    there = layout.sizes(experiment.task)
    if size not in there:
        raise ValueError(
            f"slice {name!r} has no layout for {experiment.task} with {size}; choose one of {', '.join(there)}. Use :{size} without a "
            f"slice and choose config.train.batch_size and config.mesh.fsdp by --mode compile --topology {layout.topology}"
        )
    each = layout.batch[size]
    if experiment.task != "pretrain":
        each = min(-(-experiment.train.batch_size // layout.chips), layout.most.get(run, experiment.train.batch_size))
    llm_remat = "full" if run in layout.whole else "dots"
    model = model.clone(
        vision=model.vision.clone(remat=layout.vision_remat),
        llm=recipe.with_dropout(model.llm.clone(remat=llm_remat), 0.0),
    )
    train = dataclasses.replace(experiment.train, batch_size=layout.chips * each, frozen_dtype=layout.frozen_dtype)
    options = experiment.options
    if isinstance(options, match.Options):
        # Negatives from the same chip need no communication; with fewer than 8 rows per chip, neighbouring chips share them.
        options = dataclasses.replace(options, group=next(each * n for n in (1, 2, 4, 8) if each * n >= 8))
    return dataclasses.replace(experiment, model=model, train=train, options=options)
