"""The GPT-3 of ModelScope (`nlp_gpt3_text-generation_*`, Megatron layout) as the language model of mPLUG-video."""

from collections.abc import Mapping

from ymplug_jax.convert import mplug_video, rules
from ymplug_jax.convert.plan import Layout, Plan

LAYOUTS = {"megatron": Layout(rules.under("", "llm/", mplug_video.GPT3))}
MERGE, FROZEN = mplug_video.MERGE, mplug_video.FROZEN


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """What the tensors are: a GPT-3 under "llm"."""
    model = mplug_video.llm_of(shapes, "language_model", heads)
    return Plan("megatron", {"llm": mplug_video.llm_like(model)}, model)
