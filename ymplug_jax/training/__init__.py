"""A run from its settings to its last checkpoint: setup, the step, the loop, evaluation, several hosts."""
