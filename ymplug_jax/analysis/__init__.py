"""Cost of a training step: memory, FLOPs, communication and time, predicted for a TPU slice or measured on this machine."""
