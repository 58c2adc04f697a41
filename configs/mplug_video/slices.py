"""Settings by TPU slice: how a run is laid out over the chips, tuned with `--mode compile`.

The frozen decoder in bf16 (2.6 or 5.3 GB) fits on every chip, so all chips are replicas: the only thing they send is the
gradient of the trained parameters. The batch grows with the slice; the rates of the recipe are for 384 and 256 examples.

The frozen decoder is run without the recipe's dropout: it draws as many random numbers as there are attention weights, and
keeps attention from being one kernel. `--config.model.llm.dropout=0.1` brings it back.
"""

import dataclasses
from typing import NamedTuple

from ymplug_jax.config import Experiment


class Layout(NamedTuple):
    """One slice: examples a step on each chip, and what the backward pass recomputes of the decoder and of the vision tower."""

    topology: str
    chips: int
    batch: dict[str, int]  # size -> examples a chip
    llm_remat: dict[str, str]
    vision_remat: str
    frozen_dtype: str = "bfloat16"


SLICES = {
    "v5e-16": Layout("v5e:4x4", 16, {"1.3b": 32, "2.7b": 16}, {"1.3b": "dots", "2.7b": "dots"}, "full"),
    "v5e-64": Layout("v5e:8x8", 64, {"1.3b": 32, "2.7b": 16}, {"1.3b": "dots", "2.7b": "dots"}, "full"),
    # The decoder in eight bits makes room for larger batches, or for a larger vision tower.
    "v5e-16-int8": Layout("v5e:4x4", 16, {"1.3b": 40, "2.7b": 24}, {"1.3b": "dots", "2.7b": "dots"}, "full", "int8"),
    "v5p-64": Layout("v5p:4x4x4", 64, {"1.3b": 32, "2.7b": 32}, {"1.3b": "dots", "2.7b": "dots"}, "dots"),
    "v5p-256": Layout("v5p:4x8x8", 256, {"1.3b": 32, "2.7b": 32}, {"1.3b": "dots", "2.7b": "dots"}, "dots"),
    "v6e-64": Layout("v6e:8x8", 64, {"1.3b": 32, "2.7b": 32}, {"1.3b": "dots", "2.7b": "dots"}, "full"),
}


def on(experiment: Experiment, size: str, name: str) -> Experiment:
    """The experiment laid out for a slice: chips counted as devices, e.g. "v5p-256" is a slice of 256 chips.

    Pre-training takes the slice's batch. Fine-tuning keeps its recipe's, raised to a multiple of the chips.

    Raises:
      ValueError: an unknown slice.
    """
    if name not in SLICES:
        raise ValueError(f"slice {name!r} is unknown; there are {', '.join(SLICES)}")
    layout, model = SLICES[name], experiment.model
    model = model.clone(
        vision=model.vision.clone(remat=layout.vision_remat),
        llm=model.llm.clone(remat=layout.llm_remat[size], dropout=0.0),
    )
    each = layout.batch[size]
    if experiment.task != "pretrain":
        each = -(-experiment.train.batch_size // layout.chips)
    train = dataclasses.replace(experiment.train, batch_size=layout.chips * each, frozen_dtype=layout.frozen_dtype)
    return dataclasses.replace(experiment, model=model, train=train)
