"""Generate small videos, valid and invalid ones, for the tests of the shard builder."""

import wave
from pathlib import Path

import av
import numpy as np


def write(
    path: Path, frames: int = 24, size: tuple[int, int] = (64, 48), codec: str = "libx264", fps: int = 12
) -> Path:
    """Write a clip whose frame i has the brightness 8 * i + 20, so that a decoded frame reveals its index."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), 20 + 8 * i % 220, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """Write a file with an audio stream only."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(b"\0\0" * 8000)
    return path


def write_csv(path: Path, header: str, rows: list[tuple[str, ...]], bom: bool = False) -> Path:
    lines = [header, *(",".join('"' + value.replace('"', '""') + '"' for value in row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig" if bom else "utf-8")
    return path
