"""Tasks of mPLUG-video."""
