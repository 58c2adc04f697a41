"""What models are trained for: one record of functions a task, by model family."""
