"""Tasks of ALPRO."""
