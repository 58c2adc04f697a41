"""What tasks of several families share: examples, losses, ranking, metrics."""
