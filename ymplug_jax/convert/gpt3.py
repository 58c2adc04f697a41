"""The GPT-3 of ModelScope (`nlp_gpt3_text-generation_*`, Megatron layout) as the language model of mPLUG-video."""

from collections.abc import Mapping

from ymplug_jax.convert import mplug_video, rules
from ymplug_jax.convert.plan import Plan

TABLE = rules.under("", "llm/", mplug_video.GPT3)
MERGE = mplug_video.MERGE


def plan(shapes: Mapping[str, tuple[int, ...]], heads: Mapping[str, int]) -> Plan:
    """What the tensors are: a GPT-3 under "llm"."""
    like = {"llm": mplug_video.llm_like(shapes, "language_model", heads)}
    return Plan(TABLE, like, ())
