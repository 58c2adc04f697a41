"""mPLUG-2 in both variants, small enough for tests that train; without heads."""

from ymplug_jax.models.bert import Text
from ymplug_jax.models.bert_decoder import Decoder
from ymplug_jax.models.clip_vit import VideoClipViT
from ymplug_jax.models.mplug2 import MPLUG2
from ymplug_jax.models.timesformer import TimeSformer
from ymplug_jax.models.universal import Fusion, Universal

SIZES = {"width": 16, "heads": 2, "hidden": 24}
SMALL = {"vocab": 64, "depth": 1, "max_positions": 24, "dropout": 0.0, **SIZES}
YOUKU = MPLUG2(
    vision=TimeSformer(image_size=16, patch_size=8, depth=1, width=16, heads=2, frames=2),
    text=Text(**SMALL),
    fusion=Fusion(depth=1, dropout=0.0, **SIZES),
    decoder=Decoder(**SMALL),
    variant="mplug_youku",
)
RELEASED = YOUKU.clone(
    vision=VideoClipViT(image_size=16, patch_size=8, depth=1, width=16, heads=2, mlp=32),
    universal=Universal(queries=4, dropout=0.0, attn_dropout=0.0, **SIZES),
    variant="mplug2",
)
