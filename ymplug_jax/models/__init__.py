"""Flax linen modules, each with a table of the logical axes of its parameters. See docs/models/."""
