"""Training and evaluation of a run: setup, training step, loop, evaluation, run folder and multi-host coordination."""
