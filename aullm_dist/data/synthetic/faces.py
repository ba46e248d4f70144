"""Draws schematic gray faces whose skin is moved by AUs, in plain numpy.

A generator for tests and demos: no claim about real faces is made from it. A subject is one still picture with its own
geometry, skin texture and light; a clip is that picture sampled through a displacement field (the sum of the Gaussian
windows that the active AUs push, times their onset-apex-offset profiles) and a drifting head, under flickering light,
with sensor noise. Nothing but the displacement depends on the labels. Where each AU pulls follows the FACS
descriptions; how far and how wide is ours.

Coordinates of a face: x to the picture's right, y down, origin in the middle of the face, unit = the face's width. The
subject's left is the picture's right.
"""

from dataclasses import dataclass

import numpy as np

from aullm_dist.data.corpora.drawn import ClipPlan, Look, Movement
from aullm_dist.data.synthetic.portrait import Geometry, blur, draw_face, draw_geometry
from aullm_dist.data.synthetic.spec import SyntheticSpec

_FACE_WIDTH = 0.72  # of the frame's shorter side
_SUPERSAMPLING = 2  # the still picture is this much finer than a frame: sub-pixel moves then hardly change sharpness


@dataclass(frozen=True, slots=True)
class _Bump:
    """A Gaussian window at (x, y) with widths (sx, sy), in face widths, pushing by (dx, dy) of the amplitude.

    Given for the subject's left side (x > 0) and mirrored for the right one, unless it lies on the midline (x == 0).
    """

    x: float
    y: float
    sx: float
    sy: float
    dx: float
    dy: float


def look_of(spec: SyntheticSpec) -> Look:
    """Return the camera that the spec's `shift` asks for."""
    if spec.shift == "none":
        return Look()
    if spec.shift == "vignette_banding":
        return Look(vignette_banding=True)
    return spec.facts.look


def au_bumps(au: int, face: Geometry) -> tuple[_Bump, ...]:
    """Return the pushes of an AU on this face.

    Raises:
        KeyError: the generator does not know the AU.
    """
    f = face
    upper_lid, lower_lid = f.eye_y - 0.6 * f.eye_height, f.eye_y + 0.7 * f.eye_height
    table: dict[int, tuple[_Bump, ...]] = {
        1: (_Bump(0.09, f.brow_y - 0.01, 0.07, 0.08, 0.0, -1.0),),
        2: (_Bump(0.30, f.brow_y, 0.08, 0.08, 0.05, -1.0),),
        4: (_Bump(0.11, f.brow_y, 0.10, 0.07, -0.6, 0.8),),
        5: (_Bump(f.eye_x, upper_lid, f.eye_width, 0.028, 0.0, -1.0),),
        6: (_Bump(0.25, 0.07, 0.11, 0.06, -0.15, -0.95), _Bump(0.33, f.eye_y + 0.03, 0.05, 0.04, -0.4, 0.0)),
        7: (
            _Bump(f.eye_x, lower_lid, f.eye_width, 0.028, -0.1, -0.9),
            _Bump(f.eye_x, upper_lid, f.eye_width, 0.022, 0.0, 0.45),
        ),
        9: (_Bump(0.06, f.nose_y - 0.09, 0.055, 0.08, 0.1, -1.0), _Bump(0.05, f.brow_y, 0.05, 0.05, -0.2, 0.5)),
        10: (_Bump(0.07, f.mouth_y - 0.05, 0.08, 0.05, 0.1, -1.0),),
        12: (_Bump(f.mouth_width, f.mouth_y, 0.09, 0.08, 0.75, -0.65),),
        14: (_Bump(f.mouth_width + 0.01, f.mouth_y, 0.075, 0.06, -1.0, 0.05),),
        15: (_Bump(f.mouth_width, f.mouth_y + 0.02, 0.07, 0.08, 0.05, 1.0),),
        17: (_Bump(0.0, f.mouth_y + 0.12, 0.12, 0.07, 0.0, -1.0),),
        20: (_Bump(f.mouth_width, f.mouth_y + 0.01, 0.09, 0.06, 1.0, 0.15),),
        24: (_Bump(0.0, f.mouth_y - 0.04, 0.12, 0.03, 0.0, 0.8), _Bump(0.0, f.mouth_y + 0.05, 0.12, 0.03, 0.0, -0.8)),
        25: (_Bump(0.0, f.mouth_y + 0.06, 0.11, 0.04, 0.0, 1.0),),
        43: (_Bump(f.eye_x, upper_lid, f.eye_width, 0.035, 0.0, 1.6),),
        45: (_Bump(f.eye_x, upper_lid, f.eye_width, 0.035, 0.0, 1.8),),
    }
    return table[au]


def displacement_field(movement: Movement, face: Geometry, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return how far the skin at (x, y) is pushed by an AU at its peak.

    Args:
        movement: AU, side and strength.
        face: the subject's geometry.
        x, y: face coordinates `[1, W]` and `[H, 1]`.

    Returns:
        `[2, H, W]` float32 (x, y), in units of the corpus's nominal amplitude.
    """
    field = np.zeros((2, y.size, x.size), dtype=np.float32)
    for bump in au_bumps(movement.au, face):
        signs = {"left": (1,), "right": (-1,), "both": (1, -1)}[movement.side] if bump.x else (1,)
        for sign in signs:
            window = np.exp(-0.5 * ((y - bump.y) / bump.sy) ** 2) * np.exp(-0.5 * ((x - sign * bump.x) / bump.sx) ** 2)
            field[0] += sign * bump.dx * window
            field[1] += bump.dy * window
    return movement.strength * field


def profile(movement: Movement, clip: ClipPlan, frame_numbers: np.ndarray) -> np.ndarray:
    """Return an AU's strength over time: 0 at onset, 1 near the apex, the clip's residual at offset; `[T]` float32.

    A blink (AU45) closes and reopens around the apex instead; a static AU is held at 1.
    """
    if movement.static:
        return np.ones(len(frame_numbers), dtype=np.float32)
    time = frame_numbers.astype(np.float64) - clip.onset
    length = clip.offset - clip.onset
    peak = np.clip(clip.apex - clip.onset + movement.lag * length, 1.0, length - 1.0)
    if movement.au == 45:
        return np.exp(-0.5 * ((time - peak) / (0.13 * length)) ** 2).astype(np.float32)
    rise, fall = _smoothstep(time / peak), _smoothstep((time - peak) / (length - peak))
    return (rise * (1.0 - (1.0 - clip.residual) * fall)).astype(np.float32)


def _smoothstep(u: np.ndarray) -> np.ndarray:
    u = np.clip(u, 0.0, 1.0)
    return u * u * (3.0 - 2.0 * u)


class Subject:
    """One synthetic person under one camera: a still picture, drawn once, and the clips rendered from it."""

    def __init__(self, spec: SyntheticSpec, subject: int) -> None:
        """Draw the person with number `subject` (from 0)."""
        rng = np.random.default_rng([*spec.seed_words, 2, subject])
        self.spec = spec
        self.look = look_of(spec)
        self.geometry = draw_geometry(rng)
        height, width = spec.frame_height_width
        self.face_width_pixels = _FACE_WIDTH * min(height, width) * float(rng.uniform(0.94, 1.06))
        self._centre = (
            (height - 1) / 2 + 0.02 * height * float(rng.uniform(-1, 1)),
            (width - 1) / 2 + 0.02 * width * float(rng.uniform(-1, 1)),
        )
        # A margin lets head drift and displacement read beyond the frame's edge.
        self._margin = 8
        rows = np.arange((height + 2 * self._margin) * _SUPERSAMPLING) / _SUPERSAMPLING - self._margin
        columns = np.arange((width + 2 * self._margin) * _SUPERSAMPLING) / _SUPERSAMPLING - self._margin
        picture = draw_face(self.geometry, *self._face_coordinates(rows, columns), rng)
        picture = blur(picture, self.look.blur_pixels * _SUPERSAMPLING)
        # The gray curve of gain * picture is gain**gamma * picture**gamma: done once here, and on the gains below.
        self._picture = (255.0 * picture**self.look.gamma).astype(np.float32)
        self._frame_coordinates = self._face_coordinates(np.arange(height), np.arange(width))
        self._gain_map = _vignette(height, width, rng) if self.look.vignette_banding else None

    def _face_coordinates(self, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x = (columns[None, :] - self._centre[1]) / self.face_width_pixels
        y = (rows[:, None] - self._centre[0]) / self.face_width_pixels
        return x, y

    def render(self, clip: ClipPlan) -> np.ndarray:
        """Render a clip with the spec's context frames before onset and after offset.

        Returns:
            `[T, H, W]` uint8 gray frames, numbered from `clip.onset - context_frames`.
        """
        spec = self.spec
        rng = np.random.default_rng([*spec.seed_words, 3, clip.index])
        numbers = np.arange(clip.onset - spec.context_frames, clip.offset + spec.context_frames + 1)
        amplitude_pixels = spec.amplitude_percent / 100.0 * self.face_width_pixels
        fields = [displacement_field(m, self.geometry, *self._frame_coordinates) for m in clip.movements]
        profiles = [amplitude_pixels * profile(m, clip, numbers) for m in clip.movements]
        # Each clip is a new sitting: the head is somewhere else, a little, and then drifts.
        steps = rng.standard_normal((len(numbers), 2)) * spec.jitter_pixels / np.sqrt(len(numbers))
        drift = rng.uniform(-0.015, 0.015, size=2) * self.face_width_pixels + np.cumsum(steps, axis=0)
        gains = self._light(len(numbers), rng)
        height, width = spec.frame_height_width
        sigma = np.float32(spec.noise * self.look.noise_factor)
        frames = np.empty((len(numbers), height, width), dtype=np.uint8)
        for t in range(len(numbers)):
            moved = np.zeros((2, height, width), dtype=np.float32)
            for field, strength in zip(fields, profiles, strict=True):
                moved += strength[t] * field
            frame = self._sample(moved, drift[t]) * gains[t]
            frame += sigma * rng.standard_normal((height, width), dtype=np.float32)
            frames[t] = np.clip(frame + 0.5, 0.0, 255.0)
        return frames

    def _light(self, num_frames: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Gain of each frame: a scalar, or a `[H, W]` map under `vignette_banding`."""
        level = rng.uniform(0.94, 1.06)
        mains = np.sin(2 * np.pi * (rng.uniform(0.3, 0.5) * np.arange(num_frames) + rng.uniform()))
        flicker = 1.0 + self.spec.flicker * (mains + rng.standard_normal(num_frames)) / np.sqrt(1.5)
        gains = np.maximum(level * flicker, 0.0) ** self.look.gamma
        if self._gain_map is None:
            return list(gains.astype(np.float32))
        height, _ = self.spec.frame_height_width
        gains = gains * (1.0 + rng.uniform(-0.08, 0.08) * np.linspace(0.0, 1.0, num_frames))
        depth, cycles = rng.uniform(0.02, 0.05), rng.uniform(1.5, 4.0)
        speed, phase = rng.uniform(-0.2, 0.2), rng.uniform()
        rows = np.arange(height)[:, None] / height
        return [
            (gain * self._gain_map * (1.0 + depth * np.sin(2 * np.pi * (cycles * rows + speed * t + phase)))).astype(
                np.float32
            )
            for t, gain in enumerate(gains)
        ]

    def _sample(self, moved: np.ndarray, drift: np.ndarray) -> np.ndarray:
        """Read the still picture where each pixel's skin came from, bilinearly; `moved` in pixels is overwritten."""
        height, width = moved.shape[1:]
        source_x, source_y = np.negative(moved[0], out=moved[0]), np.negative(moved[1], out=moved[1])
        source_x += (np.arange(width) + (self._margin - drift[1])).astype(np.float32)[None, :]
        source_y += (np.arange(height) + (self._margin - drift[0])).astype(np.float32)[:, None]
        rows, columns = self._picture.shape
        source_x = np.clip(source_x * _SUPERSAMPLING, 0, columns - 1.001)
        source_y = np.clip(source_y * _SUPERSAMPLING, 0, rows - 1.001)
        left, top = source_x.astype(np.int32), source_y.astype(np.int32)
        u, v = source_x - left, source_y - top
        corner = top * columns + left
        pixels = self._picture.ravel()
        upper, lower = pixels[corner], pixels[corner + columns]
        upper += u * (pixels[corner + 1] - upper)
        lower += u * (pixels[corner + columns + 1] - lower)
        upper += v * (lower - upper)
        return upper


def _vignette(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Gain map of a lens that darkens towards the corners, a little off centre; `[H, W]`, at most 1."""
    row_centre, column_centre = 0.5 + rng.uniform(-0.1, 0.1, size=2)
    rows = (np.arange(height)[:, None] / height - row_centre) * 2.0
    columns = (np.arange(width)[None, :] / width - column_centre) * 2.0
    return 1.0 / (1.0 + rng.uniform(0.15, 0.35) * (rows**2 + columns**2)) ** 2
