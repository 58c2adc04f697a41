"""Settings, state, placement on the mesh, the optimizer, checkpoints and metrics: used by every other package."""
