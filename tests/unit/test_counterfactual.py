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
