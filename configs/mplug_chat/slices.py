"""Layouts of runs of the chat model on TPU slices, tuned with `--mode compile`; see SCALING.md.

BLOOMZ-7B1 in bf16 takes 13.2 GiB. It is replicated where it fits, so that chips exchange only the gradient of the trained parameters;
on v5e it is sharded over four chips, and every layer is gathered when it is needed. The batch size grows with the slice, but the learning rates of the
recipe are for its own batches.
"""

import dataclasses
from typing import NamedTuple

from ymplug_jax.core.config import Experiment


class Layout(NamedTuple):
    """Layout of one slice: rows of 2,048 tokens per chip, and what the backward pass rematerialises."""

    topology: str
    chips: int
    rows: dict[str, int]  # task -> rows per chip
    llm_remat: str  # of the decoder
    fsdp: int = 1  # chips that the parameters are sharded over
    frozen_dtype: str = "bfloat16"
    vision_remat: str = "full"


SIZES = ("7b",)  # sizes that the layouts were compiled for
SLICES = {
    "v5p-4": Layout("v5p:2x2x1", 4, {"mplug_chat_pretrain": 8, "mplug_chat_instruct": 8}, "dots"),
    "v5e-16": Layout("v5e:4x4", 16, {"mplug_chat_pretrain": 2, "mplug_chat_instruct": 4}, "full", fsdp=4),
}


def on(experiment: Experiment, size: str, name: str) -> Experiment:
    """Apply the layout of a slice to an experiment. Names count chips: "v5e-16" has 16 chips.

    Raises:
      ValueError: The slice is unknown or has no layout for the size.
    """
    if name not in SLICES:
        raise ValueError(f"unknown slice {name!r}; choose one of {', '.join(SLICES)}")
    layout, model = SLICES[name], experiment.model
    if size not in SIZES:
        raise ValueError(
            f"slice {name!r} has no layout for {size}; choose one of {', '.join(SIZES)}. Use :{size} without a slice and choose "
            f"config.train.batch_size and config.mesh.fsdp by --mode compile --topology {layout.topology}"
        )
    model = model.clone(
        vision=model.vision.clone(remat=layout.vision_remat), llm=model.llm.clone(remat=layout.llm_remat)
    )
    batch = layout.chips * layout.rows[experiment.task]
    train = dataclasses.replace(experiment.train, batch_size=batch, frozen_dtype=layout.frozen_dtype)
    mesh = dataclasses.replace(experiment.mesh, fsdp=layout.fsdp)
    return dataclasses.replace(experiment, model=model, train=train, mesh=mesh)
