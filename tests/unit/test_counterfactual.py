"""Interventions change one cause and hold everything else."""

import numpy as np
import pytest

from aullm_dist.model import counterfactual
from aullm_dist.model.counterfactual import Chances, change_appearance, draw_interventions, remove_movement


def _face(seed: int = 0, size: int = 64) -> np.ndarray:
    """A smooth random texture in 0.2..0.8."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(rng.normal(size=(size, size)))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    texture = np.fft.irfft2(spectrum * np.exp(-((frequency / 0.08) ** 2)), s=(size, size))
    return (0.5 + 0.3 * texture / np.abs(texture).max()).astype(np.float32)


def _moving_clip(noise: float = 0.0, seed: int = 1) -> np.ndarray:
    """A local bump grows over six frames while the head drifts a little."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    bump = 0.2 * np.exp(-((y - 44) ** 2 + (x - 20) ** 2) / 20.0)
    frames = [counterfactual._translate(_face() + bump * t / 5, (0.3 * t, -0.2 * t)) for t in range(6)]
    return np.clip(np.stack(frames) + rng.normal(0, noise, (6, 64, 64)), 0, 1).astype(np.float32)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (0.6, -1.3), (-2.2, 0.4), (1.5, 1.5)])
def test_translation_is_found_to_a_tenth_of_a_pixel(shift):
    reference = _face()
    found = counterfactual._translation(reference, counterfactual._translate(reference, shift))
    assert found == pytest.approx(shift, abs=0.1)


def test_neutral_twin_keeps_the_jitter_and_loses_the_movement():
    clip = _moving_clip()
    twin = remove_movement(clip, clip[0], np.random.default_rng(0))
    static = counterfactual._translate(_face(), (1.5, -1.0))
    region = (slice(36, 54), slice(10, 30))
    moved = np.abs(clip[5][region] - static[region]).mean()
    left = np.abs(twin[5][region] - static[region]).mean()
    assert left < 0.25 * moved
    # The head still drifts: a frozen onset frame would not follow it.
    assert np.abs(twin[5] - static).mean() < np.abs(clip[0] - static).mean()


def test_neutral_twin_is_not_constant_and_has_the_clips_noise():
    clip = _moving_clip(noise=0.01)
    twin = remove_movement(clip, clip[0], np.random.default_rng(0))
    background = (slice(None), slice(4, 24), slice(36, 60))
    ratio = np.diff(twin[background], axis=0).std() / np.diff(clip[background], axis=0).std()
    assert 0.7 < ratio < 1.4


def test_noise_level_is_measured():
    rng = np.random.default_rng(0)
    residual = rng.normal(0, 0.02 * np.sqrt(2), (5, 64, 64))
    assert counterfactual._noise_level(residual) == pytest.approx(0.02, rel=0.05)


def test_appearance_changes_the_face_and_keeps_the_shape_and_range():
    clip = _moving_clip()
    for seed in range(20):
        changed = change_appearance(clip, np.random.default_rng(seed))
        assert changed.shape == clip.shape
        assert changed.dtype == np.float32
        assert changed.min() >= 0
        assert changed.max() <= 1
        assert np.abs(changed - clip).max() > 1e-3


def test_draws_are_different_interventions_keyed_by_the_generator():
    chances = Chances(2, {"structure": 1.0, "appearance": 1.0, "neutral": 0.5})
    drawn = [draw_interventions(chances, np.random.default_rng(seed)) for seed in range(300)]
    assert all(len(set(kinds)) == 2 for kinds in drawn)
    assert drawn == [draw_interventions(chances, np.random.default_rng(seed)) for seed in range(300)]
    share = {name: np.mean([name in kinds for kinds in drawn]) for name in ("structure", "appearance", "neutral")}
    assert share["neutral"] < share["structure"]
    assert min(share.values()) > 0.2


def test_an_impossible_intervention_is_never_drawn():
    chances = Chances(3, {"structure": 0.0, "appearance": 1.0})
    assert draw_interventions(chances, np.random.default_rng(0)) == ("appearance",)
    assert draw_interventions(Chances(0, {"appearance": 1.0}), np.random.default_rng(0)) == ()


class Scripted:
    """A generator that draws what it is given: the changes picked, the upper bound of each range, and one deviation."""

    def __init__(self, picks: list[bool]):
        self._picks = picks

    def random(self, size):
        assert size == len(self._picks)
        return np.where(self._picks, 0.49, 0.5)

    def uniform(self, low, high, size=None):
        assert low < high
        return high if size is None else np.full(size, high)

    def normal(self, mean, deviation, size):
        return np.full(size, mean + deviation)

    def integers(self, high):
        return high - 1


def _wedge() -> np.ndarray:
    """Two frames of 5 x 7 pixels that no symmetry maps onto themselves."""
    y, x = np.mgrid[:5, :7]
    return np.stack([0.1 + 0.05 * y + 0.06 * x, 0.2 + 0.03 * y * x / 4]).astype(np.float32)


def test_each_change_of_appearance_by_hand():
    clip = _wedge()

    def changed(place: int | None) -> np.ndarray:
        return change_appearance(clip, Scripted([i == place for i in range(5)]))

    assert changed(0) == pytest.approx(clip**1.4, abs=1e-6)
    y, x = np.meshgrid(np.linspace(-1, 1, 5), np.linspace(-1, 1, 7), indexing="ij")
    bump = np.exp(-((y - 0.7) ** 2 + (x - 0.7) ** 2) / 0.8)
    assert changed(1) == pytest.approx(np.clip(clip * (1 + 0.3 * (0.5 * (y + x) + bump)), 0, 1), abs=1e-6)
    assert changed(2) == pytest.approx(clip * 1.015, abs=1e-6)
    assert changed(4) == pytest.approx(clip[:, :, ::-1])
    assert changed(None) == pytest.approx(clip[:, :, ::-1])  # at least one is applied, here the last
    everything = change_appearance(clip, Scripted([True] * 5))
    assert everything.mean() != pytest.approx(changed(0).mean(), rel=0.01)


def test_blur_is_a_gaussian_of_five_taps_along_rows_and_columns():
    clip = _wedge()
    taps = np.exp(-0.5 * (np.arange(-2, 3) / 0.8) ** 2)
    taps /= taps.sum()
    expected = np.zeros_like(clip)
    for row in range(5):
        for column in range(7):
            for down, weight in zip(range(-2, 3), taps, strict=True):
                for right, other in zip(range(-2, 3), taps, strict=True):
                    # Reflected at the borders: -1 is 1, and 5 of 5 rows is 3.
                    source = 4 - abs(4 - abs(row + down)), 6 - abs(6 - abs(column + right))
                    expected[:, row, column] += weight * other * clip[:, source[0], source[1]]
    assert change_appearance(clip, Scripted([i == 3 for i in range(5)])) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shift", [(1.25, -2.5), (-0.5, 0.75), (0.0, 3.0)])
def test_a_frame_is_moved_pixel_by_pixel(shift):
    frame = _wedge()[1]
    expected = np.empty_like(frame)
    for row in range(5):
        for column in range(7):
            y, x = np.clip(row - shift[0], 0, 4), np.clip(column - shift[1], 0, 6)
            top, left = int(y), int(x)
            below, beyond = min(top + 1, 4), min(left + 1, 6)
            upper = frame[top, left] * (1 - x + left) + frame[top, beyond] * (x - left)
            lower = frame[below, left] * (1 - x + left) + frame[below, beyond] * (x - left)
            expected[row, column] = upper * (1 - y + top) + lower * (y - top)
    assert counterfactual._translate(frame, shift) == pytest.approx(expected, abs=1e-6)


def test_neutral_twin_replays_gain_and_shift_of_each_frame():
    face = np.pad(_face(), 8, mode="edge")
    clip = np.stack([face, 0.9 * face, 1.1 * counterfactual._translate(face, (0.5, -0.75))])
    onset = np.ascontiguousarray(face[::-1])
    twin = remove_movement(clip, onset, Scripted([]))
    expected = [onset, 0.9 * onset, 1.1 * counterfactual._translate(onset, (0.5, -0.75))]
    assert np.abs(twin - np.stack(expected)).mean() < 2e-3
    assert remove_movement(clip[:1], onset, np.random.default_rng(0)) == pytest.approx(onset[None], abs=1e-6)
