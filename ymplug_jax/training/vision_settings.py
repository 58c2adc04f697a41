"""Settings of a vision tower that no parameter shape reveals, compared with those of the weights that a run starts from."""

import json
from typing import Any

from etils import epath

from ymplug_jax.core import checkpoint_files, config
from ymplug_jax.core.config import Experiment
from ymplug_jax.core.exits import Mistake
from ymplug_jax.training import run_folder

HIDDEN = ("double_cls",)  # a tower with another value computes something else from the same parameters


def check(experiment: Experiment) -> None:
    """Check that the vision towers of config.train.init_from compute what the run's tower computes.

    Raises:
      Mistake: a setting differs; the message names the folder and the value to set.
    """
    model = config.settings_of(experiment.model)
    after = model.get("vision") if isinstance(model, dict) else None
    if not isinstance(after, dict):
        return
    for subtree, _, name in checkpoint_files.sources(experiment.train.init_from):
        if subtree not in ("", "vision"):
            continue
        before = _tower_in(checkpoint_files.folder_of(name))
        for setting in HIDDEN:
            if setting in before and setting in after and before[setting] != after[setting]:
                raise Mistake(
                    f"config.model.vision.{setting}: {after[setting]!r}, but the vision tower of config.train.init_from {name} was trained with "
                    f"{before[setting]!r}; set config.model.vision.{setting}={before[setting]!r}"
                )


def _tower_in(folder: epath.Path) -> dict[str, Any]:
    """Return the vision settings of a run or a conversion; empty if the folder does not record them."""
    if (folder / run_folder.CONFIG).exists():
        model = config.settings_of(run_folder.read_settings(folder).model)
        return dict(model.get("vision") or {}) if isinstance(model, dict) else {}
    record = folder / "conversion.json"
    try:
        sizes = list(json.loads(record.read_text(encoding="utf-8"))["sizes"].values()) if record.exists() else []
    except (ValueError, KeyError, AttributeError):
        raise Mistake(f"{record}: damaged; run the conversion again") from None
    found = [one.get("vision") for one in sizes if isinstance(one, dict)]
    return dict(next((one for one in found if isinstance(one, dict)), {}))
