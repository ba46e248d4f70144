"""Draws and applies CCR's counterfactual interventions: which one a clip gets, and what it does to it (ours).

An intervention changes one cause and holds everything else. `appearance` changes how the face looks and keeps the
movement; `neutral` removes the movement and keeps the clip's own jitter, flicker and noise; `structure` edits the AU
graph and leaves the clip alone, so it needs no pixels here. Everything is numpy on single clips, so that loader
processes can do it, and every draw comes from the generator that the caller keys by (seed, epoch, sample id).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aullm_dist.config import Config

INTERVENTIONS = ("structure", "appearance", "neutral")


@dataclass(frozen=True, slots=True)
class Chances:
    """How many different interventions a clip gets, and the relative chance of each."""

    branches: int
    probabilities: dict[str, float]

    @property
    def names(self) -> tuple[str, ...]:
        """Interventions that may be drawn, in the fixed order of `INTERVENTIONS`."""
        return tuple(name for name in INTERVENTIONS if self.probabilities.get(name, 0.0) > 0)


@dataclass(frozen=True, slots=True)
class Counts:
    """What clips become: `clips` of them have so many views, structures and branches (numbers may be means)."""

    clips: float
    views: float
    structures: float
    branches: float

    def times(self, clips: int) -> "Counts":
        """Return the counts of as many clips, each like this one on average, rounded up."""
        each = (self.views, self.structures, self.branches)
        # Means are sums of products of chances: 4 may come as 4.0000000001.
        return Counts(clips, *(math.ceil(round(clips * n / self.clips, 6)) for n in each))


def branching(config: Config, has_graph: bool) -> tuple[Chances, bool]:
    """Return which interventions a run's training clips draw, and whether a neutral twin is crossed with its clip."""
    counterfactual = config.counterfactual
    probabilities = {
        "structure": counterfactual.structure_probability if has_graph else 0.0,
        "appearance": counterfactual.appearance_probability,
        "neutral": counterfactual.neutral_probability,
    }
    chances = Chances(counterfactual.branches if counterfactual.enabled else 0, probabilities)
    possible = chances.branches > 0 and "neutral" in chances.names
    return chances, has_graph and counterfactual.contradiction_weight > 0 and possible


def counts_of(kinds: Sequence[str], crossed: bool) -> Counts:
    """Return what one clip becomes that drew the interventions `kinds`; crossing a neutral twin adds two branches."""
    views = 1 + sum(kind != "structure" for kind in kinds)
    branches = 1 + len(kinds) + (2 if crossed and "neutral" in kinds else 0)
    return Counts(1, views, 1 + len(kinds), branches)


def mean_and_largest(chances: Chances, crossed: bool) -> tuple[Counts, Counts]:
    """Return what one clip becomes on average over all draws, and at most."""
    names = chances.names
    total, mean, most = sum(chances.probabilities[name] for name in names), [0.0] * 3, counts_of((), crossed)
    for drawn in itertools.permutations(names, min(chances.branches, len(names))):
        probability, left = 1.0, total
        for name in drawn:
            probability *= chances.probabilities[name] / left
            left -= chances.probabilities[name]
        counts = counts_of(drawn, crossed)
        each = (counts.views, counts.structures, counts.branches)
        mean = [m + probability * n for m, n in zip(mean, each, strict=True)]
        most = Counts(1, *(max(a, b) for a, b in zip((most.views, most.structures, most.branches), each, strict=True)))
    return Counts(1, *mean), most


def draw_interventions(chances: Chances, rng: np.random.Generator) -> tuple[str, ...]:
    """Draw `chances.branches` different interventions for one clip, in the fixed order of `INTERVENTIONS`."""
    names = chances.names
    if not chances.branches or not names:
        return ()
    weights = np.array([chances.probabilities[name] for name in names])
    chosen = rng.choice(len(names), size=min(chances.branches, len(names)), replace=False, p=weights / weights.sum())
    return tuple(names[i] for i in sorted(chosen))


def change_appearance(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the same movement on a changed appearance.

    At least one of gamma, local shading, flicker, blur and mirror is applied; each with probability 1/2.

    Args:
        clip: `[T, H, W]` float32 in 0..1.
        rng: generator of this draw.
    """
    picks = rng.random(5) < 0.5
    if not picks.any():
        picks[rng.integers(5)] = True
    gamma, shading, flicker, blur, mirror = picks
    out = clip
    if gamma:
        out = np.power(np.clip(out, 0.0, 1.0), rng.uniform(0.7, 1.4))
    if shading:
        out = out * _smooth_field(clip.shape[1:], rng, strength=0.3)
    if flicker:
        out = out * (1.0 + rng.normal(0.0, 0.015, size=(len(clip), 1, 1)))
    if blur:
        out = _blur(out, rng.uniform(0.3, 0.8))
    if mirror:
        out = out[:, :, ::-1]
    return np.ascontiguousarray(np.clip(out, 0.0, 1.0), dtype=np.float32)


def remove_movement(clip: np.ndarray, onset_frame: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the clip with do(movement := none): its onset frame with the clip's own jitter, flicker and noise.

    A constant clip would give the Eulerian dynamics exactly 0 and teach nothing, so the global translation, the gain
    and the sensor noise of each frame are measured against the first one and replayed on the onset frame.

    Args:
        clip: `[T, H, W]` float32 in 0..1, the sampled frames.
        onset_frame: `[H, W]` float32, the first frame of the whole clip.
        rng: generator of this draw.
    """
    reference = clip[0]
    mean = max(float(reference.mean()), 1e-6)
    frames = []
    residuals = []
    for frame in clip:
        shift = _translation(reference, frame)
        gain = float(frame.mean()) / mean
        frames.append(_translate(onset_frame, shift) * gain)
        residuals.append(frame - _translate(reference, shift) * gain)
    noise = _noise_level(np.stack(residuals[1:])) if len(clip) > 1 else 0.0
    twin = np.stack(frames) + rng.normal(0.0, 1.0, size=clip.shape) * noise
    return np.clip(twin, 0.0, 1.0).astype(np.float32)


def _smooth_field(shape: Sequence[int], rng: np.random.Generator, strength: float) -> np.ndarray:
    """A multiplicative shading field `[H, W]` around 1: a random plane and one broad bump."""
    y, x = np.meshgrid(np.linspace(-1, 1, shape[0]), np.linspace(-1, 1, shape[1]), indexing="ij")
    tilt = rng.uniform(-1, 1, size=2)
    centre = rng.uniform(-0.7, 0.7, size=2)
    bump = np.exp(-((y - centre[0]) ** 2 + (x - centre[1]) ** 2) / rng.uniform(0.2, 0.8))
    return 1.0 + strength * (0.5 * (tilt[0] * y + tilt[1] * x) + rng.uniform(-1, 1) * bump)


def _blur(clip: np.ndarray, sigma: float) -> np.ndarray:
    """Separable Gaussian blur of `[T, H, W]` with a five-tap kernel and reflected borders."""
    taps = np.exp(-0.5 * (np.arange(-2, 3) / sigma) ** 2)
    taps /= taps.sum()
    for axis in (1, 2):
        size = clip.shape[axis]
        padded = np.pad(clip, [(2, 2) if a == axis else (0, 0) for a in range(3)], mode="reflect")
        clip = sum(tap * np.take(padded, range(i, i + size), axis=axis) for i, tap in enumerate(taps))
    return clip


def _translation(reference: np.ndarray, frame: np.ndarray, iterations: int = 4) -> tuple[float, float]:
    """Global translation (rows, columns) in pixels of `frame` against `reference`, at most 4 pixels each.

    Source: Lucas and Kanade (1981), one window over the whole frame: jitter is small, so the linearisation holds, and a
    local muscle movement weighs little.
    """
    shift = np.zeros(2)
    for _ in range(iterations):
        moved = _translate(reference, (float(shift[0]), float(shift[1])))
        rows, columns = np.gradient(moved)
        normal = np.array([[(rows * rows).sum(), (rows * columns).sum()], [(rows * columns).sum(), (columns**2).sum()]])
        error = moved - frame * (moved.mean() / max(float(frame.mean()), 1e-6))
        right = np.array([(rows * error).sum(), (columns * error).sum()])
        shift = np.clip(shift + np.linalg.solve(normal + 1e-6 * np.eye(2), right), -4.0, 4.0)
    return float(shift[0]), float(shift[1])


def _translate(frame: np.ndarray, shift: tuple[float, float]) -> np.ndarray:
    """Move `[H, W]` by (rows, columns) pixels with bilinear sampling and replicated borders."""
    for axis, amount in enumerate(shift):
        positions = np.clip(np.arange(frame.shape[axis]) - amount, 0, frame.shape[axis] - 1)
        low = np.floor(positions).astype(int)
        high = np.minimum(low + 1, frame.shape[axis] - 1)
        weight = (positions - low).reshape((-1, 1) if axis == 0 else (1, -1))
        frame = np.take(frame, low, axis=axis) * (1 - weight) + np.take(frame, high, axis=axis) * weight
    return frame


def _noise_level(residual: np.ndarray) -> float:
    """Return the noise of one frame (standard deviation) from differences of frames `[T, H, W]`.

    The median hardly sees a local movement.
    """
    high_pass = residual[:, 1:, 1:] - residual[:, :-1, 1:] - residual[:, 1:, :-1] + residual[:, :-1, :-1]
    # Four pixels enter the high pass and two frames the residual: the variance is 8 times that of one pixel.
    return float(1.4826 * np.median(np.abs(high_pass)) / np.sqrt(8.0))
