"""Resize and augmentation of training clips on the devices, with `config.data.window`; see `data/windows.py` for what they get.

The resize is a matrix product along each axis, in float32. It adds up in another order than the host's, so that a pixel may differ
by one level, as it may between two processors. Warps are integer arithmetic, equal to OpenCV's in every bit.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ymplug_jax.core import sharding
from ymplug_jax.core.config import Data
from ymplug_jax.core.exits import Mistake
from ymplug_jax.data import transforms, windows
from ymplug_jax.tasks.common import preprocess

Batch = dict[str, jax.Array]


def window_spec(data: Data, spec: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return what the loader yields for the arrays `spec` of a training example, without B.

    Raises:
      Mistake: `config.data.window` is set, but the task or the settings leave nothing to do on the devices.
    """
    if not data.window:
        return {}
    if not data.augment:
        raise Mistake("config.data.window: needs config.data.augment; set it to 0, or augment to True")
    video = spec.get("video")
    if video is None or video.shape != preprocess.video_spec(data).shape:
        raise Mistake("config.data.window: this task prepares its media on the host; set it to 0")
    if data.window < data.image_size:
        raise Mistake(
            f"config.data.window: {data.window} is smaller than config.data.image_size; set it to {data.image_size} or more"
        )
    return {"video": jax.ShapeDtypeStruct(windows.shape(data.frames, data.window), jnp.uint8)}


def finisher(data: Data, mesh: jax.sharding.Mesh) -> Callable[[Batch], Batch]:
    """Return the function that turns the windows of a batch into its videos; the identity without `config.data.window`."""
    if not data.window:
        return lambda batch: batch

    def each(clips: jax.Array) -> jax.Array:
        return jax.lax.map(lambda clip: finish(clip, data.image_size, wrap=data.wrap_uint8), clips)

    place = P(sharding.BATCH_AXES)
    finished = jax.shard_map(each, mesh=mesh, in_specs=place, out_specs=place, check_vma=False)
    return lambda batch: batch | {"video": finished(batch["video"])}


def finish(clip: jax.Array, size: int, *, wrap: bool = False) -> jax.Array:
    """Do to a clip what `transforms.train_transform` does.

    Args:
      clip: uint8[T, P + 1, P, 3], packed by `data/windows.py`.
      size: height and width of the result, pixels.
      wrap: wrap values beyond 0..255 modulo 256 after resizing, instead of clipping.

    Returns:
      uint8[T, size, size, 3].
    """
    frames, side = clip.shape[0], clip.shape[2]
    head = clip[0, side].reshape(-1)[: 2 * windows.DRAWS].astype(jnp.int32).reshape(windows.DRAWS, 2)
    height, width, flip, *operations = head[:, 0] + 256 * head[:, 1]
    x = clip[:, :side].astype(jnp.float32)
    down, across = (_cubic(length, side, size) for length in (height, width))
    x = jnp.einsum("tpqc,uq->tpuc", x, across, precision="highest")  # [T, P, S, 3]
    x = jnp.einsum("tpuc,sp->tsuc", x, down, precision="highest")  # [T, S, S, 3]
    levels = jnp.trunc(x).astype(jnp.int32)
    levels = levels & 255 if wrap else jnp.clip(levels, 0, 255)
    levels = jnp.where(flip > 0, levels[:, :, ::-1], levels)
    pixels = levels.transpose(1, 2, 0, 3).reshape(size * size, frames * 3)  # [S * S, T * 3]
    branches = [_branch(name, size) for name in transforms.OPERATIONS]
    for operation in operations:
        pixels = jax.lax.switch(operation, branches, pixels)
    return pixels.reshape(size, size, frames, 3).transpose(2, 0, 1, 3).astype(jnp.uint8)


def _cubic(length: jax.Array, side: int, size: int) -> jax.Array:
    """Matrix f32[size, side] of a bicubic resize (a = -0.75) of the first `length` of `side` values."""
    a = -0.75
    place = (jnp.arange(size) + 0.5) * (length / size) - 0.5
    first = jnp.floor(place)
    x = place - first
    far, near = (lambda d: ((a * d - 5 * a) * d + 8 * a) * d - 4 * a), (lambda d: ((a + 2) * d - (a + 3)) * d * d + 1)
    taps = [far(x + 1), near(x), near(1 - x)]
    taps.append(1 - taps[0] - taps[1] - taps[2])
    columns = jnp.arange(side)
    matrix = jnp.zeros((size, side))
    for k, tap in enumerate(taps):
        matrix += jnp.where(columns == jnp.clip(first + k - 1, 0, length - 1)[:, None], tap[:, None], 0.0)
    return matrix


def _branch(name: str, size: int) -> Callable[[jax.Array], jax.Array]:
    """The operation at the reference's level, on int32[S * S, T * 3]."""
    if name not in transforms.WARPS:
        return lambda pixels: pixels  # the identity at this level
    places, fractions = transforms.warp_maps(name, transforms.LEVEL, size, size)
    left, top = places[..., 0].ravel().astype(np.int32), places[..., 1].ravel().astype(np.int32)
    right, low = fractions.ravel().astype(np.int32) & 31, fractions.ravel().astype(np.int32) >> 5
    (grey,) = set(transforms.FILL)

    def warp(pixels: jax.Array) -> jax.Array:
        total = jnp.full_like(pixels, 512)  # rounds to nearest
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (low if dy else 32 - low) * (right if dx else 32 - right)
            if not weight.any():
                continue
            row, column = top + dy, left + dx
            inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
            tap = pixels[np.where(inside, row * size + column, 0)]
            total += weight[:, None] * jnp.where(inside[:, None], tap, grey)
        return total >> 10

    return warp
