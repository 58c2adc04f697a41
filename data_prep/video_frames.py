"""Frames of video files under the name that scripts for data preparation import; the code is `ymplug_jax.data.video_file`."""

from ymplug_jax.data.video_container import Reject
from ymplug_jax.data.video_file import Clip, Reader, read_clip, timeline

__all__ = ["Clip", "Reader", "Reject", "read_clip", "timeline"]
