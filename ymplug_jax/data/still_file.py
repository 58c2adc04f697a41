"""Reading of a still image file as one JPEG frame. Like videos, images are read in the child process of `video_file.Reader`."""

import os
import warnings

import cv2
import numpy as np
from PIL import Image

from ymplug_jax.data.video_container import MIN_SIDE, Reject, line

# By content, whatever the name. JPEG includes MPO, a JPEG with more pictures behind the first, as some cameras save.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = (
    108_000_000  # width x height of the source, checked before decoding; the largest sensors of phones have fewer
)
ORIENTATION = 0x0112  # the EXIF tag
BACKGROUND = (255, 255, 255)  # below transparent pixels, as on a web page


def read_still(path: str, short_side: int, quality: int, max_bytes: int) -> tuple[bytes, int, int]:
    """Read an image: upright by its EXIF orientation, without transparency, short side at most `short_side`; larger ones are scaled.

    Args:
      path: JPEG, PNG, WebP, GIF or BMP with one picture.
      short_side: pixels.
      quality: of the JPEG, 1 to 100.
      max_bytes: largest file.

    Returns:
      (JPEG, height, width).

    Raises:
      Reject: not_an_image, empty_file, truncated, unreadable, too_small, too_large.
    """
    size = os.path.getsize(path)
    if size == 0:
        raise Reject("empty_file", "zero bytes")
    if size > max_bytes:
        raise Reject("too_large", f"{size:,} bytes; the limit is {max_bytes:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about sizes below MAX_PIXELS and damaged metadata
            image, wanted = _loaded(path, short_side)
        return _jpeg(image, wanted, quality)
    except MemoryError:
        raise Reject("too_large", "does not fit into memory") from None


def _loaded(path: str, short_side: int) -> tuple[Image.Image, tuple[int, int]]:
    """The decoded picture as stored in the file, and its (width, height) after scaling."""
    try:
        image = Image.open(path, formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Reject("too_large", f"{width}x{height} pixels")
        if min(width, height) < MIN_SIDE:
            raise Reject("too_small", f"{width}x{height} pixels")
        pictures = getattr(image, "n_frames", 1)
        if pictures > 1 and image.format != "MPO":
            raise Reject("not_an_image", f"an animation of {pictures} pictures; list it as a video")
        scale = min(1.0, short_side / min(width, height))
        wanted = max(1, round(width * scale)), max(1, round(height * scale))
        if scale < 1:
            image.draft(None, (2 * wanted[0], 2 * wanted[1]))  # decodes a large JPEG at a fraction of its size
        image.load()
        return image, wanted
    except (Reject, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        with open(path, "rb") as file:
            raise Reject("not_an_image", f"begins with {file.read(16)!r}") from None
    except Image.DecompressionBombError as error:
        raise Reject("too_large", line(error)) from None
    except (
        Exception
    ) as error:  # Pillow raises many things on damaged data: OSError, SyntaxError, struct.error, zlib.error
        raise Reject("truncated" if "truncated" in str(error) else "unreadable", line(error)) from None


def _jpeg(image: Image.Image, wanted: tuple[int, int], quality: int) -> tuple[bytes, int, int]:
    turn = _turn(image)
    plain = _rgb(image)
    if plain.size != wanted:
        plain = plain.resize(wanted, Image.Resampling.BICUBIC)
    if turn is not None:
        plain = plain.transpose(turn)
    if max(plain.size) > 65500:
        raise Reject("too_large", f"{plain.size[0]}x{plain.size[1]} pixels; a JPEG has at most 65500")
    pixels = np.ascontiguousarray(np.asarray(plain)[:, :, ::-1])  # uint8[H, W, 3], BGR
    jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
    return jpeg, plain.size[1], plain.size[0]


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The turn that makes the picture upright; None if there is no such tag or it cannot be read."""
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        return turns.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged EXIF data raise many things; viewers show such a picture as it is stored
        return None


def _rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, on BACKGROUND where it is transparent; 16-bit grey is scaled to 8 bits."""
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip to 255
        deep = np.asarray(image)
        image = Image.fromarray((np.clip(deep, 0, 65535).astype(np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        below = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        image = Image.alpha_composite(below, image)
    return image.convert("RGB")
