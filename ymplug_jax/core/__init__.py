"""Settings, state, placement on the mesh, the optimizer, checkpoints and metrics: what every other package stands on."""
