"""Code shared by the tasks of all model families: examples, losses, ranking, metrics."""
