"""Prints of clips for the search for near-duplicates: perceptual hashes of frames, compared as sets.

A hash holds the signs of the 64 lowest frequencies of a view of a frame (discrete cosine transform of 32 x 32 pixels, the constant
left out), and which 40 of them are the strongest. Weak frequencies change their signs with every encoding; comparing only what is
strong in both frames is what makes strong encodings, logos and crops harmless. Views are the whole frame, three centres and four
corners, so that a cropped copy meets the view that it shows. Mirroring a picture flips the signs of the odd horizontal frequencies.
"""

from typing import NamedTuple

import cv2
import numpy as np

PIXELS = 32  # both sides of a view before the transform
BITS = 64
STRONG = 40  # signs of a hash that count
# (share of height and width, vertical and horizontal position of the view, 0 to 1)
VIEWS = (
    (1, 0.5, 0.5),
    (0.9, 0.5, 0.5),
    (0.81, 0.5, 0.5),
    (0.73, 0.5, 0.5),
    (0.9, 0, 0),
    (0.9, 0, 1),
    (0.9, 1, 0),
    (0.9, 1, 1),
)
MIRRORED_VIEWS = np.array([0, 1, 2, 3, 5, 4, 7, 6])
# Pairs of views that may show the same: the whole frame and any, the same ones, and centres one step apart.
PAIRS = np.array(
    [(0, k) for k in range(8)] + [(k, 0) for k in range(1, 8)] + [(k, k) for k in range(1, 8)] + [(1, 2), (2, 3), (2, 1), (3, 2)]
)  # fmt: skip
LEAST_COMMON = 16  # signs that count in both hashes; fewer make a distance larger, not smaller
CONTRAST = 4.0  # standard deviation of brightness; flatter frames, such as those of a fade, have no print
SAME = 2.0  # distance, of 64 bits, up to which frames in a row are one frame of the print
# Frequencies (vertical, horizontal) in the order of their sum.
FREQUENCIES = sorted(((v, u) for v in range(12) for u in range(12) if v + u), key=lambda f: (f[0] + f[1], f[0]))[:BITS]
ROWS, COLUMNS = (np.array([f[axis] for f in FREQUENCIES]) for axis in (0, 1))
POWERS = np.left_shift(np.uint64(1), np.arange(BITS, dtype=np.uint64))
ODD = np.uint64(sum(1 << i for i, (_, u) in enumerate(FREQUENCIES) if u % 2))  # signs that mirroring flips
# Bits of each band of a hash: a key is one band of one view.
BANDS = (tuple(range(0, 44, 2)), tuple(range(1, 44, 2)))
MASKS = tuple(np.uint64(sum(1 << i for i in band)) for band in BANDS)
WEAK = 2  # weakest signs of a band that are tried both ways
KEY_FRAMES = 16  # frames of a print that yield keys


class Print(NamedTuple):
    """The print of a clip: F frames with V views each. F is 0 for a clip without contrast."""

    seconds: float
    signs: np.ndarray  # uint64[F, V]
    strong: np.ndarray  # uint64[F, V], the signs that count
    weak: (
        np.ndarray
    )  # uint64[F, len(BANDS), WEAK], the weakest sign of a band of the whole frame, the second weakest, ...
    weight: np.ndarray  # float32[F], share of the clip's frames that look like this one


def print_of(greys: np.ndarray, seconds: float, frames: int) -> Print:
    """Make the print of a clip.

    Args:
      greys: brightness of frames in a row, without borders: uint8[N, H, W].
      seconds: duration of the clip.
      frames: largest number of frames in the print.
    """
    groups: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    counts: list[int] = []
    for grey in greys:
        if float(grey.std()) < CONTRAST:
            continue
        signs, strong, waves = hashes(grey)
        if groups and _distance(groups[-1][0][:1], groups[-1][1][:1], signs[:1], strong[:1])[0] <= SAME:
            counts[-1] += 1
            continue
        groups.append((signs, strong, _weakest(waves[0])))
        counts.append(1)
    if len(groups) > frames:
        at = [(2 * i + 1) * len(groups) // (2 * frames) for i in range(frames)]
        groups, counts = [groups[i] for i in at], [counts[i] for i in at]
    if not groups:
        views = np.zeros((0, len(VIEWS)), np.uint64)
        return Print(seconds, views, views, np.zeros((0, len(BANDS), WEAK), np.uint64), np.zeros(0, np.float32))
    signs, strong, weak = (np.stack(part) for part in zip(*groups, strict=True))
    return Print(seconds, signs, strong, weak, (np.array(counts) / len(greys)).astype(np.float32))


def hashes(grey: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the hashes of a frame's views: (signs uint64[V], those that count uint64[V], frequencies float32[V, 64])."""
    height, width = grey.shape
    waves = np.empty((len(VIEWS), BITS), np.float32)
    for i, (share, down, across) in enumerate(VIEWS):
        tall, wide = max(1, round(share * height)), max(1, round(share * width))
        y, x = round((height - tall) * down), round((width - wide) * across)
        small = cv2.resize(grey[y : y + tall, x : x + wide], (PIXELS, PIXELS), interpolation=cv2.INTER_AREA)
        waves[i] = cv2.dct(small.astype(np.float32))[ROWS, COLUMNS]
    signs = ((waves > 0) * POWERS).sum(1, dtype=np.uint64)
    ranks = np.argsort(np.argsort(-np.abs(waves), axis=1, kind="stable"), axis=1, kind="stable")
    return signs, ((ranks < STRONG) * POWERS).sum(1, dtype=np.uint64), waves


def _weakest(waves: np.ndarray) -> np.ndarray:
    """Return the weakest signs of each band of float32[64]: uint64[bands, WEAK]."""
    return np.stack(
        [POWERS[np.array(band)[np.argsort(np.abs(waves[list(band)]), kind="stable")[:WEAK]]] for band in BANDS]
    )


def _distance(a: np.ndarray, strong_a: np.ndarray, b: np.ndarray, strong_b: np.ndarray) -> np.ndarray:
    """Return the distance of hashes: how many of 64 bits differ, estimated from those that count in both."""
    common = strong_a & strong_b
    differ = np.bitwise_count((a ^ b) & common).astype(np.float32)
    return BITS * differ / np.maximum(np.bitwise_count(common), LEAST_COMMON)


def alike(a: Print, b: Print, max_distance: float = 4.0) -> float:
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
    distance = _distance(
        short.signs[:, None, one], short.strong[:, None, one], long.signs[None, :, other], long.strong[None, :, other]
    )  # [F of short, F of long, pairs]
    found = (distance.min(2) <= max_distance).any(1)
    return float(short.weight[found].sum() / short.weight.sum())


def mirrored(one: Print) -> Print:
    """Return the print of the mirrored clip."""
    return one._replace(signs=one.signs[:, MIRRORED_VIEWS] ^ ODD, strong=one.strong[:, MIRRORED_VIEWS])


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
            tried = [one.signs[frame]]
            first, second = one.weak[frame, band]
            tried += [one.signs[frame, :1] ^ flip for flip in (first, second, first ^ second)]
            values = np.concatenate(tried) & mask
            # The bands use different bits; the lowest bit of a key tells them apart all the same.
            found |= {int(min(value, value ^ (ODD & mask))) << 1 | band for value in values}
    return sorted(found)
