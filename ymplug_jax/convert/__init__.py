"""Checkpoints of PyTorch to ours and back: the only home of torch, which no other package imports."""
