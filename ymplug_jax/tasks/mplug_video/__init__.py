"""Tasks of mPLUG-video; see docs/models/mplug_video.md."""
