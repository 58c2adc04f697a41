"""Settings by TPU slice: how a run is laid out over the chips, tuned with `--mode compile`.

The frozen decoder in bf16 (2.6 or 5.3 GB) fits on every chip, so all chips are replicas: the only thing they send is the
gradient of the trained parameters. The batch grows with the slice; the rates of the recipe are for 384 and 256 examples.

The frozen decoder is run without the recipe's dropout: it draws as many random numbers as there are attention weights, and
keeps attention from being one kernel. `--config.model.llm.dropout=0.1` brings it back.
"""

import dataclasses
from typing import NamedTuple

from configs.mplug_video import recipe
from ymplug_jax.core.config import Experiment
from ymplug_jax.tasks.mplug_video import match


class Layout(NamedTuple):
    """One slice: pre-training's examples a step on each chip, and what the backward pass recomputes.

    Of the decoder that is all but its products, unless a run is named in `whole`.
    """

    topology: str
    chips: int
    batch: dict[str, int]  # size -> examples a chip
    vision_remat: str
    frozen_dtype: str = "bfloat16"
    whole: tuple[str, ...] = ()  # "task size": rows so many or so long that all of the decoder is recomputed
    most: dict[str, int] = {}  # "task size" -> examples a chip of fine-tuning where the recipe's do not fit

    def sizes(self, task: str) -> list[str]:
        """Sizes that a task has been laid out for: of fine-tuning those of the published runs."""
        return [size for size in self.batch if task == "pretrain" or size in ("1.3b", "2.7b")]


# Of the sizes without a published run only pre-training on v5e has been compiled: 7.4 of 15.75 GiB a chip with Qwen2.5-1.5B, 7.9
# with BLOOMZ-1B7.
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
    # The decoder in eight bits makes room for larger batches, or for a larger vision tower.
    "v5e-16-int8": Layout("v5e:4x4", 16, {"1.3b": 40, "2.7b": 24}, "full", "int8"),
    "v5p-64": Layout("v5p:4x4x4", 64, {"1.3b": 32, "2.7b": 32}, "dots"),
    "v5p-256": Layout("v5p:4x8x8", 256, {"1.3b": 32, "2.7b": 32}, "dots"),
    "v6e-64": Layout("v6e:8x8", 64, {"1.3b": 32, "2.7b": 32}, "full"),
}


def on(experiment: Experiment, size: str, name: str) -> Experiment:
    """The experiment laid out for a slice: chips counted as devices, e.g. "v5p-256" is a slice of 256 chips.

    Pre-training takes the slice's batch. Fine-tuning keeps its recipe's, raised to a multiple of the chips, or what fits.

    Raises:
      ValueError: an unknown slice, or one that has no layout for the size.
    """
    if name not in SLICES:
        raise ValueError(f"slice {name!r} is unknown; there are {', '.join(SLICES)}")
    layout, model, run = SLICES[name], experiment.model, f"{experiment.task} {size}"
    there = layout.sizes(experiment.task)
    if size not in there:
        raise ValueError(
            f"slice {name!r} has no layout for {experiment.task} with {size}; there are {', '.join(there)}. Take :{size} without a "
            f"slice, and choose config.train.batch_size and config.mesh.fsdp by --mode compile --topology {layout.topology}"
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
        # Negatives from the own chip are not sent; where it has few rows, they come from its neighbours.
        options = dataclasses.replace(options, group=next(each * n for n in (1, 2, 4, 8) if each * n >= 8))
    return dataclasses.replace(experiment, model=model, train=train, options=options)
