"""Converts CLIP's image encoder to the vision tower of a new mPLUG-2, whose patches have an axis of frames and whose keys have a bias.

The conversion holds no temporal modules; a run initialises them, so that the tower sees each frame as CLIP does. Variant "mplug_youku" has
another tower, which starts from `clip`. See docs/models/mplug2.md, "Initialisation".
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from ymplug_jax.convert import clip_chat
from ymplug_jax.convert.plan import Layout, Plan
from ymplug_jax.models.clip_vit import VideoClipViT
from ymplug_jax.models.mplug2 import RESIZE

_SIZES = ("image_size", "patch_size", "depth", "width", "heads", "mlp")
_PATCH = "d rgb y x -> t y x rgb d"  # t is 1
LAYOUTS = {
    name: Layout(
        tuple(
            rule._replace(layout=_PATCH) if rule.targets == ("vision/patch/kernel",) else rule for rule in chat.rules
        ),
        drop=chat.drop,
    )
    for name, chat in clip_chat.LAYOUTS.items()
}
__all__ = ["LAYOUTS", "RESIZE", "plan"]


def spatial_like(model: VideoClipViT) -> dict:
    """Parameter tree (ShapeDtypeStructs) of the tower without its temporal modules."""
    video = jnp.zeros((1, 1, model.image_size, model.image_size, 3))
    flat = flatten_dict(jax.eval_shape(lambda: model.init(jax.random.key(0), video))["params"])
    return unflatten_dict({path: leaf for path, leaf in flat.items() if not any("temporal" in key for key in path)})


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """Recognise a CLIP model with a ViT, or its image encoder alone, in one of two layouts.

    Raises:
      UnknownModel: the tensors are not a CLIP's, or its image encoder is not a ViT.
    """
    found = clip_chat.plan(shapes, heads)
    model = VideoClipViT(**{name: getattr(found.model, name) for name in _SIZES})
    return Plan(found.layout, {"vision": spatial_like(model)}, model)
