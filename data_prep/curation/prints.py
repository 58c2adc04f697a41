"""Prints of clips for the search for near-duplicates: perceptual hashes of frames, compared as sets.

The hash of a view of a frame, scaled to 32 x 32 pixels, holds signs: of its lowest frequencies (discrete cosine transform: 96 of
the brightness without the constant, 16 of either colour difference), which tell the whole picture, and of the differences of
neighbours in a grid of 8 x 8 cells, which tell its parts; and it holds which of them are strong. What is weak changes its sign with
every encoding; comparing only what is strong in both frames is what makes strong encodings, logos and crops harmless.
Views are the whole frame, five centres and four corners, so that a cropped copy meets the view that it shows. Mirroring a picture
flips the signs of the odd horizontal frequencies and exchanges cells.
"""

from typing import NamedTuple

import cv2
import numpy as np

PIXELS = 32  # both sides of a view before the transform
BITS = 64  # of a word
WORDS = 4  # of a hash: 64 frequencies; 32 more and those of colour; differences to the right; differences downwards
CELLS = 8  # rows and columns of the grid
STRONG = (40, 20)  # signs of brightness that count in the first two words
LEAST_WAVE = 10.0  # smallest strength of a frequency that counts; 32 is a constant of one level of 255
LEAST_STEP = 3.0  # smallest difference of neighbouring cells that counts, of 255
# (share of height, share of width, vertical and horizontal position of the view, 0 to 1)
VIEWS = (
    (1, 1, 0.5, 0.5), (0.9, 0.9, 0.5, 0.5), (0.81, 0.81, 0.5, 0.5), (0.73, 0.73, 0.5, 0.5),
    (0.9, 0.9, 0, 0), (0.9, 0.9, 0, 1), (0.9, 0.9, 1, 0), (0.9, 0.9, 1, 1), (0.9, 1, 0.5, 0.5), (1, 0.9, 0.5, 0.5),
)  # fmt: skip
MIRRORED_VIEWS = np.array([0, 1, 2, 3, 5, 4, 7, 6, 8, 9])
# Pairs of views that may show the same: the whole frame and any, the same ones, and centres one step apart.
PAIRS = np.array(
    [(0, k) for k in range(10)] + [(k, 0) for k in range(1, 10)] + [(k, k) for k in range(1, 10)] + [(1, 2), (2, 3), (2, 1), (3, 2)]
)  # fmt: skip
CELL_FACTOR = 1.6  # cells of a copy that is cropped in between the views differ more than frequencies
ENOUGH = 24  # frequencies that count in both hashes; with fewer, frames are not alike
LEAST_CELLS = 16  # cells that count in both hashes; fewer make a distance smaller, since soft pictures have few
CONTRAST = 4.0  # standard deviation of brightness; flatter frames, such as those of a fade, have no print
DARK = 28  # brightness; a frame of which DARK_SHARE of the pixels are darker shows a logo or a line on black, and has no print
DARK_SHARE = 0.8
SAME = 2.0  # distance, of 64 bits, up to which frames in a row are one frame of the print
# Frequencies (vertical, horizontal) in the order of their sum, from the constant on.
FREQUENCIES = np.array(sorted(((v, u) for v in range(14) for u in range(14)), key=lambda f: (f[0] + f[1], f[0])))
LIGHT, COLOUR = FREQUENCIES[1:97], FREQUENCIES[:16]
POWERS = np.left_shift(np.uint64(1), np.arange(BITS, dtype=np.uint64))
ACROSS = np.concatenate([LIGHT[:, 1], COLOUR[:, 1], COLOUR[:, 1]]).reshape(2, BITS)
ODD = np.where(ACROSS % 2, POWERS, np.uint64(0)).sum(1, dtype=np.uint64)  # [2], signs that mirroring flips
EXCHANGED = np.arange(BITS).reshape(CELLS, CELLS)[:, ::-1].ravel()  # cells of a row in reverse
# Bits of each band of a hash: a key is one band of one view.
BANDS = (tuple(range(28)), tuple(range(0, 56, 2)))
MASKS = tuple(np.uint64(sum(1 << i for i in band)) for band in BANDS)
WEAK = 2  # weakest signs of a band that are tried both ways
KEY_FRAMES = 16  # frames of a print that yield keys


class Print(NamedTuple):
    """The print of a clip: F frames with V views each. F is 0 for a clip without contrast."""

    seconds: float
    signs: np.ndarray  # uint64[F, V, 4]
    strong: np.ndarray  # uint64[F, V, 4], the signs that count
    weak: (
        np.ndarray
    )  # uint64[F, len(BANDS), WEAK], the weakest sign of a band of the whole frame, the second weakest, ...
    weight: np.ndarray  # float32[F], share of the clip's frames that look like this one


def print_of(pictures: np.ndarray, seconds: float, frames: int) -> Print:
    """Make the print of a clip.

    Args:
      pictures: frames in a row, without borders: uint8[N, H, W, 3] in BGR.
      seconds: duration of the clip.
      frames: largest number of frames in the print.
    """
    groups: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    counts: list[int] = []
    for picture in pictures:
        planes = cv2.cvtColor(picture, cv2.COLOR_BGR2YCrCb)
        if float(planes[..., 0].std()) < CONTRAST or float(np.mean(planes[..., 0] <= DARK)) > DARK_SHARE:
            continue
        signs, strong, waves = hashes(planes)
        if groups and max(_distances(groups[-1][0][0], groups[-1][1][0], signs[0], strong[0])) <= SAME:
            counts[-1] += 1
            continue
        groups.append((signs, strong, _weakest(waves[0])))
        counts.append(1)
    if len(groups) > frames:
        at = [(2 * i + 1) * len(groups) // (2 * frames) for i in range(frames)]
        groups, counts = [groups[i] for i in at], [counts[i] for i in at]
    if not groups:
        views = np.zeros((0, len(VIEWS), WORDS), np.uint64)
        return Print(seconds, views, views, np.zeros((0, len(BANDS), WEAK), np.uint64), np.zeros(0, np.float32))
    signs, strong, weak = (np.stack(part) for part in zip(*groups, strict=True))
    return Print(seconds, signs, strong, weak, (np.array(counts) / len(pictures)).astype(np.float32))


def hashes(planes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hashes of a frame's views.

    Args:
      planes: brightness and colour differences, uint8[H, W, 3].

    Returns:
      (signs uint64[V, 4], those that count uint64[V, 4], strengths of the frequencies float32[V, 4, 64]).
    """
    height, width = planes.shape[:2]
    waves = np.empty((len(VIEWS), WORDS * BITS), np.float32)
    for i, (high, broad, down, across) in enumerate(VIEWS):
        tall, wide = max(1, round(high * height)), max(1, round(broad * width))
        y, x = round((height - tall) * down), round((width - wide) * across)
        small = cv2.resize(planes[y : y + tall, x : x + wide], (PIXELS, PIXELS), interpolation=cv2.INTER_AREA)
        light, red, blue = (small[..., k].astype(np.float32) - 128 for k in range(3))
        right = np.diff(cv2.resize(light, (CELLS + 1, CELLS), interpolation=cv2.INTER_AREA), axis=1)
        below = np.diff(cv2.resize(light, (CELLS, CELLS + 1), interpolation=cv2.INTER_AREA), axis=0)
        spectra = [cv2.dct(plane)[*which.T] for plane, which in ((light, LIGHT), (blue, COLOUR), (red, COLOUR))]
        waves[i] = np.concatenate([*spectra, right.ravel(), below.ravel()])
    counts = np.abs(waves) >= np.repeat([LEAST_WAVE, LEAST_STEP], 2 * BITS)
    for part, most in zip((slice(0, BITS), slice(BITS, len(LIGHT))), STRONG, strict=True):
        ranks = np.argsort(np.argsort(-np.abs(waves[:, part]), axis=1, kind="stable"), axis=1, kind="stable")
        counts[:, part] &= ranks < most
    words = waves.reshape(-1, WORDS, BITS)
    return _word(words > 0), _word(counts.reshape(words.shape)), words


def _word(bits: np.ndarray) -> np.ndarray:
    """Pack bool[..., 64] to uint64[...]."""
    return np.asarray(np.where(bits, POWERS, np.uint64(0)).sum(-1, dtype=np.uint64))


def _weakest(waves: np.ndarray) -> np.ndarray:
    """Return the weakest signs of each band of float32[4, 64]: uint64[bands, WEAK]."""
    power = np.abs(waves[0])
    return np.stack([POWERS[np.array(band)[np.argsort(power[list(band)], kind="stable")[:WEAK]]] for band in BANDS])


def _distances(
    a: np.ndarray, strong_a: np.ndarray, b: np.ndarray, strong_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the distances of hashes, uint64[..., 4] each, in frequencies and in cells.

    A distance is how many of 64 signs differ, estimated from those that count in both; 64 if too few frequencies do.
    """
    common = strong_a & strong_b
    differ = np.bitwise_count((a ^ b) & common).astype(np.float32)
    counted = np.bitwise_count(common).astype(np.float32)
    whole, parts = counted[..., :2].sum(-1), counted[..., 2:].sum(-1)
    in_whole = np.where(whole >= ENOUGH, BITS * differ[..., :2].sum(-1) / np.maximum(whole, 1), BITS)
    return in_whole, np.asarray(BITS * differ[..., 2:].sum(-1) / np.maximum(parts, LEAST_CELLS))


def alike(a: Print, b: Print, max_distance: float = 5.0) -> float:
    """Return how much of the shorter clip is found in the other one, mirrored or not: 0 to 1.

    Args:
      a: a print.
      b: another one.
      max_distance: distance of 64 bits up to which two frames are alike.
    """
    short, long = (a, b) if (a.seconds, len(a.weight)) <= (b.seconds, len(b.weight)) else (b, a)
    if not len(short.weight) or not len(long.weight):
        return 0.0
    return max(_covered(short, long, max_distance), _covered(short, mirrored(long), max_distance))


def _covered(short: Print, long: Print, max_distance: float) -> float:
    one, other = PAIRS[:, 0], PAIRS[:, 1]
    whole, parts = _distances(
        short.signs[:, None, one], short.strong[:, None, one], long.signs[None, :, other], long.strong[None, :, other]
    )  # [F of short, F of long, pairs]
    found = ((whole <= max_distance) & (parts <= CELL_FACTOR * max_distance)).any((1, 2))
    return float(short.weight[found].sum() / short.weight.sum())


def mirrored(one: Print) -> Print:
    """Return the print of the mirrored clip."""
    signs, strong = one.signs[:, MIRRORED_VIEWS], one.strong[:, MIRRORED_VIEWS]
    right, below = (_exchanged(signs[..., k]) for k in (2, 3))
    turned = [signs[..., 0] ^ ODD[0], signs[..., 1] ^ ODD[1], ~right, below]
    counts = [strong[..., 0], strong[..., 1], _exchanged(strong[..., 2]), _exchanged(strong[..., 3])]
    return one._replace(signs=np.stack(turned, -1), strong=np.stack(counts, -1))


def _exchanged(words: np.ndarray) -> np.ndarray:
    """Reverse the rows of 8 bits of uint64[...]."""
    return _word((words[..., None] & POWERS > 0)[..., EXCHANGED])


def keys(one: Print) -> list[int]:
    """Return the keys of a clip, sorted: near-duplicates share at least one.

    A key is a band of a view's signs, in the smaller of its two mirror forms. The two weakest signs of the band are tried both ways
    in the whole frame.
    """
    count = len(one.weight)
    at = range(count) if count <= KEY_FRAMES else [(2 * i + 1) * count // (2 * KEY_FRAMES) for i in range(KEY_FRAMES)]
    found: set[int] = set()
    for frame in at:
        for band, mask in enumerate(MASKS):
            signs, (first, second) = one.signs[frame, :, 0], one.weak[frame, band]
            values = np.concatenate([signs, *(signs[:1] ^ flip for flip in (first, second, first ^ second))]) & mask
            # The lowest bit of a key tells the bands apart.
            found |= {int(min(value, value ^ (ODD[0] & mask))) << 1 | band for value in values}
    return sorted(found)
