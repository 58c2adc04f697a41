"""Position tables at another resolution or number of frames."""

import jax
import jax.numpy as jnp


def resize_pos_embed(table: jax.Array, patches: int) -> jax.Array:
    """Resize a spatial position table, f32[1 + P, D] -> f32[1 + patches, D].

    Keeps row 0 (cls) and resizes the square grid bilinearly, with half-pixel centres and without antialiasing.

    Raises:
      ValueError: a number of patches is not a square.
    """
    old, new = round((table.shape[0] - 1) ** 0.5), round(patches**0.5)
    if old**2 != table.shape[0] - 1 or new**2 != patches:
        raise ValueError(
            f"pos_embed: {table.shape[0] - 1} patches cannot be resized to {patches}, because both must be squares; change "
            "config.model.vision.image_size"
        )
    grid = table[1:].astype(jnp.float32).reshape(old, old, -1)
    grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "linear", antialias=False)
    return jnp.concatenate([table[:1].astype(jnp.float32), grid.reshape(patches, -1)])  # [1 + patches, D]


def resize_temporal_embed(table: jax.Array, frames: int) -> jax.Array:
    """Resize a time table linearly, with half-pixel centres and without antialiasing: f32[T, D] -> f32[frames, D]."""
    return jax.image.resize(table.astype(jnp.float32), (frames, table.shape[-1]), "linear", antialias=False)
