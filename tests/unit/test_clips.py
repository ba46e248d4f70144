"""Temporal sampling and augmentation of prepared clips."""

import numpy as np

from aullm_dist.data.clips import Clip, augment, most_changed, sample_frames


def _clip(numbers: list[int]) -> Clip:
    """A clip whose gray level is its frame number."""
    frames = np.stack([np.full((4, 4), n, dtype=np.uint8) for n in numbers])
    return Clip("x", frames, np.array(numbers))


def _levels(frames: np.ndarray) -> list[float]:
    return [round(float(level) * 255, 3) for level in frames[:, 0, 0]]


def test_frames_are_uniform_in_time_from_onset_to_offset():
    assert _levels(sample_frames(_clip(list(range(10, 21))), 6)) == [10, 12, 14, 16, 18, 20]


def test_dropped_frames_leave_no_jump_in_time():
    # Frames 11 to 14 are missing: the nearest stored frames stand in, and the rest keeps its time.
    assert _levels(sample_frames(_clip([10, 15, 16, 17, 18, 19, 20]), 6)) == [10, 10, 15, 16, 18, 20]


def test_a_short_clip_is_interpolated():
    assert _levels(sample_frames(_clip([0, 10]), 6)) == [0, 2, 4, 6, 8, 10]


def test_a_single_frame_is_repeated():
    assert _levels(sample_frames(_clip([7]), 3)) == [7, 7, 7]


def test_a_cut_leaves_out_its_share_at_either_end():
    assert _levels(sample_frames(_clip(list(range(0, 101))), 6, (0.2, 0.1))) == [20, 34, 48, 62, 76, 90]


def test_augmentation_is_the_same_for_all_frames():
    rng = np.random.default_rng(0)
    still = np.repeat(rng.random((1, 16, 16), dtype=np.float32) * 0.8, 4, axis=0)
    moved = augment(still, np.random.default_rng(3))
    assert moved.shape == still.shape
    assert moved.dtype == np.float32
    assert np.abs(moved - moved[:1]).max() == 0
    assert np.abs(moved - still).max() > 0


def test_the_frame_of_the_largest_movement_is_found_through_noise_and_flicker():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64]
    course = np.concatenate([np.linspace(0, 1, 12), np.linspace(1, 0.2, 8)])
    spot = np.exp(-((x - 20) ** 2 + (y - 40) ** 2) / 50.0)
    frames = 110 + 12 * course[:, None, None] * spot + rng.normal(0, 4, (20, 64, 64))
    frames += rng.normal(0, 3, 20)[:, None, None]
    clip = Clip("clip", frames.clip(0, 255).astype(np.uint8), np.arange(20))
    assert most_changed(clip) in (10, 11, 12)
