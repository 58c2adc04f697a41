"""Conversion between PyTorch checkpoints and Orbax checkpoints. No other package imports torch."""
