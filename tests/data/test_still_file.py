"""Still images: formats, orientation, transparency, depth and reject reasons."""

import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import videos
from ymplug_jax.data import still_file, video_file
from ymplug_jax.data.video_container import Reject

RED, BLUE = (200, 30, 40), (10, 20, 220)


def picture(size: tuple[int, int] = (60, 40)) -> Image.Image:
    """Red, with a blue top left quarter."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (0, 0, size[0] // 2, size[1] // 2))
    return image


def read(path: Path) -> np.ndarray:
    clip = video_file.read_image(str(path))
    assert (len(clip.frames), clip.timestamps, clip.decoded) == (1, [0], 1)
    pixels = cv2.imdecode(np.frombuffer(clip.frames[0], np.uint8), cv2.IMREAD_COLOR_RGB)
    assert pixels.shape == (clip.height, clip.width, 3)
    return pixels


def corner(pixels: np.ndarray) -> str:
    """Where the blue quarter is."""
    return next(
        name
        for name, (y, x) in {"tl": (4, 4), "tr": (4, -4), "bl": (-4, 4), "br": (-4, -4)}.items()
        if np.abs(pixels[y, x].astype(int) - BLUE).max() < 12
    )


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp", ".gif", ".mpo"])
def test_formats_are_known_by_content(tmp_path: Path, suffix: str):
    more = {"save_all": True, "append_images": [Image.new("RGB", (60, 40))]} if suffix == ".mpo" else {}
    picture().save(tmp_path / f"a{suffix}", **more)
    path = (tmp_path / f"a{suffix}").rename(tmp_path / "a.dat")
    pixels = read(path)
    assert pixels.shape == (40, 60, 3), "small images are not enlarged"
    assert corner(pixels) == "tl"
    np.testing.assert_allclose(pixels[-4, -4], RED, atol=12)


@pytest.mark.parametrize(
    ("value", "where"), list(zip(range(1, 10), ["tl", "tr", "br", "bl", "tl", "tr", "br", "bl", "tl"], strict=True))
)
def test_exif_orientation(tmp_path: Path, value: int, where: str):
    exif = Image.Exif()
    exif[still_file.ORIENTATION] = value
    picture().save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels = read(tmp_path / "a.jpg")
    assert corner(pixels) == where and pixels.shape[:2] == ((60, 40) if 5 <= value <= 8 else (40, 60))


def test_large_images_are_scaled_to_the_short_side(tmp_path: Path):
    picture((1200, 600)).save(tmp_path / "a.jpg")
    pixels = read(tmp_path / "a.jpg")
    assert pixels.shape == (256, 512, 3) and corner(pixels) == "tl"


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("RGBA", (9, 9, 9, 0), (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), (127, 127, 127)),
        ("LA", (7, 0), (255, 255, 255)),
        ("L", 90, (90, 90, 90)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 90 * 257, (90, 90, 90)),
        ("P", 0, (255, 255, 255)),
    ],
)
def test_transparency_and_depth(tmp_path: Path, mode: str, colour: object, seen: tuple[int, int, int]):
    if mode == "P":
        Image.new("RGB", (32, 32), RED).quantize(4).save(tmp_path / "a.png", transparency=0)
    else:
        Image.new(mode, (32, 32), colour).save(tmp_path / "a.png")
    np.testing.assert_allclose(read(tmp_path / "a.png").mean((0, 1)), seen, atol=2)


def test_cmyk(tmp_path: Path):
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    np.testing.assert_allclose(read(tmp_path / "a.jpg")[5, 5], (255, 0, 0), atol=3)


def claims(png: bytes, side: int) -> bytes:
    """The file with another width and height in its header."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def test_unusable_files_have_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    animation = {"save_all": True, "append_images": [Image.new("RGB", (60, 40))]}
    for name in ("a.gif", "a.webp", "a.png"):
        picture().save(tmp_path / name, **animation)
    picture((600, 400)).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "damaged.png")
    whole = (tmp_path / "damaged.png").read_bytes()
    (tmp_path / "damaged.png").write_bytes(whole[:500] + bytes(400) + whole[900:])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    picture().save(tmp_path / "a.tif")
    videos.write(tmp_path / "a.mp4", frames=2)
    Image.new("RGB", (15, 100)).save(tmp_path / "small.png")
    Image.new("1", (66_000, 16)).save(tmp_path / "long.png")
    for name, side in (("bomb.png", 20_000), ("wide.png", 12_000)):
        (tmp_path / name).write_bytes(claims(whole, side))
    reasons = {}
    for path in sorted(tmp_path.iterdir()):
        if path.name != "whole.jpg":
            with pytest.raises(Reject) as caught:
                read(path)
            assert caught.value.detail and "\n" not in caught.value.detail
            reasons[path.name] = caught.value.reason
    assert reasons == {
        "a.gif": "not_an_image", "a.mp4": "not_an_image", "a.png": "not_an_image", "a.tif": "not_an_image",
        "a.webp": "not_an_image", "bomb.png": "too_large", "cut.jpg": "truncated", "damaged.png": "unreadable",
        "empty.jpg": "empty_file", "long.png": "too_large", "page.jpg": "not_an_image", "small.png": "too_small",
        "wide.png": "too_large",
    }  # fmt: skip
    monkeypatch.setattr(video_file, "MAX_BYTES", 10)
    with pytest.raises(Reject, match="bytes; the limit is 10"):
        read(tmp_path / "whole.jpg")
