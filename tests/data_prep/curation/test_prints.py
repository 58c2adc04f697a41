"""Prints: copies are found whatever was done to them, and clips that only share something are not joined."""

from itertools import combinations

import numpy as np
import pytest

import curation_clips as clips
from data_prep import plant_copies
from data_prep.curation import prints
from data_prep.curation.content import look
from data_prep.curation.prints import Print, alike, keys, mirrored
from data_prep.curation.settings import Content, Duplicates

CLIPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


def print_of(frames: np.ndarray, folder, quality: str = plant_copies.CLEAN) -> Print:
    return look(str(clips.write(frames, folder / "a.mp4", quality)), Content(), Duplicates()).print


@pytest.fixture(scope="module")
def originals(folder) -> list[Print]:
    return [print_of(clips.moving(seed), folder) for seed in range(CLIPS)]


@pytest.mark.parametrize("kind", plant_copies.COPIES)
def test_copies_share_a_key_and_are_alike(kind, originals, folder):
    quality = plant_copies.STRONG if kind == "recoded" else plant_copies.CLEAN
    for seed, original in enumerate(originals):
        copy = print_of(plant_copies.COPIES[kind](clips.moving(seed), np.random.default_rng(seed)), folder, quality)
        assert set(keys(copy)) & set(keys(original)), seed
        assert alike(copy, original) >= Duplicates().min_alike, seed
        assert alike(copy, original) == alike(original, copy)


def test_different_clips_are_not_alike(originals):
    assert max(alike(a, b) for a, b in combinations(originals, 2)) < 0.2


def test_a_print_is_wholly_like_itself_and_its_mirror(originals):
    one = originals[0]
    assert alike(one, one) == alike(one, mirrored(one)) == 1.0
    twice = mirrored(mirrored(one))
    assert all(np.array_equal(a, b) for a, b in zip(twice, one, strict=True))
    assert keys(mirrored(one)) == keys(one) == sorted(set(keys(one)))


def test_the_mirrored_print_is_that_of_the_mirrored_pictures():
    """Signs that count are exactly those of the mirrored picture; where width is odd by a view, one in a hundred may differ."""
    frames = clips.moving(4, 4)
    straight = prints.print_of(frames, 1.0, 8)
    turned = prints.print_of(np.ascontiguousarray(frames[:, :, ::-1]), 1.0, 8)
    common = mirrored(straight).strong & turned.strong
    differ = np.bitwise_count((mirrored(straight).signs ^ turned.signs) & common).sum()
    assert differ <= 0.01 * np.bitwise_count(common).sum()


def test_clips_with_the_same_black_intro_are_not_joined(folder):
    black = np.zeros((24, 144, 192, 3), np.uint8)
    a, b = (print_of(np.concatenate([black, clips.moving(seed)]), folder) for seed in (0, 1))
    assert alike(a, b) < 0.2
    assert not set(keys(a)) & set(keys(b))


def test_clips_with_the_same_logo_on_black_are_not_joined(folder):
    black = np.zeros((24, 144, 192, 3), np.uint8)
    black[:, 60:90, 70:130] = 200
    a, b = (print_of(np.concatenate([black, clips.moving(seed)]), folder) for seed in (0, 1))
    assert alike(a, b) < 0.2


def test_clips_that_share_a_third_are_not_joined(folder):
    shared = clips.moving(0, 12)
    a, b = (print_of(np.concatenate([shared, clips.moving(seed, 24)]), folder) for seed in (1, 2))
    assert 0.2 < alike(a, b) < Duplicates().min_alike


def test_static_clips_are_joined_only_if_they_show_the_same(folder):
    stills = [np.repeat(clips.picture(seed)[None], 24, axis=0) for seed in (0, 1)]
    a, b = (print_of(frames, folder) for frames in stills)
    assert len(a.weight) == 1 and a.weight[0] == 1
    assert alike(a, b) == 0
    assert alike(a, print_of(stills[0], folder, plant_copies.STRONG)) == 1


def test_black_and_flat_clips_have_no_print(folder):
    flat = np.full((24, 144, 192, 3), 90, np.uint8)
    a, b = (print_of(frames, folder) for frames in (np.zeros_like(flat), flat))
    assert len(a.weight) == len(b.weight) == 0
    assert alike(a, b) == alike(a, a) == 0 and keys(a) == []


def test_the_number_of_frames_and_keys_is_bounded():
    many = np.concatenate([clips.moving(seed, 3) for seed in range(40)])
    one = prints.print_of(many, 10.0, 32)
    assert len(one.weight) == 32
    assert len(keys(one)) <= prints.KEY_FRAMES * len(prints.BANDS) * (len(prints.VIEWS) + 3)
    assert all(0 <= key < 2**64 for key in keys(one))
