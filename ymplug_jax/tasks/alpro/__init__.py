"""Tasks of ALPRO; see docs/models/alpro.md."""
