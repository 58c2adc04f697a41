"""Frames of records as thumbnails embedded in a page."""

import base64
from functools import lru_cache

import cv2
import numpy as np

from ymplug_jax.data.records import Split

FRAMES = 4  # frames per clip
HEIGHT = 96  # height of a thumbnail in pixels
WIDEST = 4  # largest width as a multiple of the height; wider frames are squeezed


class Pictures:
    """Thumbnails of records as data URIs, cached."""

    def __init__(self, records: Split | None):
        self._records = records
        self._of = lru_cache(maxsize=512)(self._draw)

    def of(self, index: int | None, count: int = FRAMES) -> list[str]:
        """`count` evenly spaced frames of the record at `index`; [] if there is no such record or no frame can be decoded."""
        if self._records is None or index is None or not 0 <= index < len(self._records):
            return []
        return self._of(index, count)

    def _draw(self, index: int, count: int) -> list[str]:
        assert self._records is not None
        stored = self._records[index].frames
        if not len(stored):
            return []
        middles = np.linspace(0, len(stored) - 1, 2 * count + 1).round().astype(int)[1::2].tolist()
        places = sorted(set(middles)) if len(stored) < count else middles
        return [picture for place in places if (picture := thumbnail(stored[place]))]


def thumbnail(jpeg: bytes, height: int = HEIGHT) -> str | None:
    """Scale a JPEG to a height in pixels: a data URI, or None if it cannot be decoded."""
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR) if jpeg else None
    if image is None:
        return None
    high, wide = image.shape[:2]
    width = min(WIDEST * height, max(1, round(wide * height / high)))
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
    return data_uri(data, "jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """Encode an image as a data URI."""
    return f"data:image/{kind};base64," + base64.b64encode(data).decode()
