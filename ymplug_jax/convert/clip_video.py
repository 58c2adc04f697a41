"""Tables of mPLUG-2's vision tower, whose names are those of OpenAI's CLIP with local temporal modules inside the layers.

`VISION` maps the released tower, `LINEAR_ADAPTERS` that of Youku-mPLUG's copy, whose modules have no activation. See
docs/models/mplug2.md, Vision.
"""

from ymplug_jax.convert import clip_chat
from ymplug_jax.convert.rules import SAME, Rule, norm

_BLOCK = "visual.transformer.resblocks.{}"
_CLIP = (
    *(rule for rule in clip_chat.OPENAI if rule.source != "visual.conv1.weight"),
    Rule("visual.conv1.weight", "d rgb t y x -> t y x rgb d", ("patch/kernel",)),
)


def _adapters(down: str, conv: str, up: str) -> tuple[Rule, ...]:
    """The temporal modules of a layer, given the names of their three convolutions."""
    rules: list[Rule] = []
    for number in "12":
        source, target = f"{_BLOCK}.lmhra{number}", f"blocks/temporal_{number}"
        rules += [
            *norm(f"{source}.ln", f"{target}/norm"),
            Rule(f"{source}.{down}.weight", "c d 1 1 1 -> d c", (f"{target}/down/kernel",)),
            Rule(f"{source}.{down}.bias", SAME, (f"{target}/down/bias",)),
            Rule(f"{source}.{conv}.weight", "c 1 t 1 1 -> t c", (f"{target}/conv/kernel",)),
            Rule(f"{source}.{conv}.bias", SAME, (f"{target}/conv/bias",)),
            Rule(f"{source}.{up}.weight", "d c 1 1 1 -> c d", (f"{target}/up/kernel",)),
            Rule(f"{source}.{up}.bias", SAME, (f"{target}/up/bias",)),
        ]
    return tuple(rules)


VISION = (*_CLIP, *_adapters("down_proj", "conv", "up_proj"))
LINEAR_ADAPTERS = (*_CLIP, *_adapters("pos_embed.0", "pos_embed.1", "pos_embed.2"))
DROP = (
    r"visual\.proj",
)  # path regexes of tensors without a use: CLIP's projection to the width shared with its text tower
