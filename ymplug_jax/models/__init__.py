"""Linen modules, each with the table that names the axes of its parameters."""
