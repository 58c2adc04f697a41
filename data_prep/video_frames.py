"""Alias of `ymplug_jax.data.video_file` for data preparation scripts."""

from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_file import Clip, Reader, read_clip, timeline

__all__ = ["Clip", "Reader", "Reject", "read_clip", "timeline"]
