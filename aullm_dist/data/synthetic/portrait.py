"""Draws the still picture of one synthetic person: geometry, skin, hair and light, with soft edges.

A generator for tests and demos: no claim about real faces is made from it. Nothing here knows of labels.

Coordinates of a face: x to the picture's right, y down, origin in the middle of the face, unit = the face's width.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where a person's features lie, in face widths; brow, eye and mouth corner are given for x > 0."""

    half_height: float
    jaw: float
    brow_y: float
    brow_arch: float
    brow_thickness: float
    eye_x: float
    eye_y: float
    eye_width: float
    eye_height: float
    nose_y: float
    nose_width: float
    mouth_y: float
    mouth_width: float
    lip_height: float


def draw_geometry(rng: np.random.Generator) -> Geometry:
    """Draw a person's geometry."""
    brow_y = rng.uniform(-0.255, -0.215)
    return Geometry(
        half_height=rng.uniform(0.62, 0.70),
        jaw=rng.uniform(0.15, 0.45),
        brow_y=brow_y,
        brow_arch=rng.uniform(0.01, 0.035),
        brow_thickness=rng.uniform(0.016, 0.028),
        eye_x=rng.uniform(0.19, 0.22),
        eye_y=brow_y + rng.uniform(0.105, 0.13),
        eye_width=rng.uniform(0.080, 0.098),
        eye_height=rng.uniform(0.030, 0.042),
        nose_y=rng.uniform(0.11, 0.15),
        nose_width=rng.uniform(0.055, 0.075),
        mouth_y=rng.uniform(0.295, 0.335),
        mouth_width=rng.uniform(0.15, 0.185),
        lip_height=rng.uniform(0.025, 0.042),
    )


def draw_face(face: Geometry, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a person.

    Args:
        face: geometry.
        x, y: face coordinates of the columns `[1, W]` and of the rows `[H, 1]`.
        rng: draws skin, hair, light and spots.

    Returns:
        `[H, W]` gray values in (0, 1).
    """
    skin, hair, backdrop = rng.uniform(0.52, 0.74), rng.uniform(0.08, 0.30), rng.uniform(0.25, 0.55)
    picture = backdrop + 0.06 * _noise_field(rng, x, y, cell=0.5)
    picture = _paint(picture, skin * 0.72, _edge(np.abs(x) - 0.26, 0.01) * _edge(0.3 - y, 0.02))
    hair_value = hair * (1.0 + 0.15 * _noise_field(rng, x * 2.0, y * 0.5, cell=0.05))
    hair_shape = _ellipse(x, y + 0.08, 0.56, face.half_height + 0.02)
    picture = _paint(picture, hair_value, _edge(hair_shape, 0.02) * _edge(y - rng.uniform(-0.25, 0.25), 0.05))

    light_x, light_y = rng.uniform(-0.22, 0.22), rng.uniform(-0.22, -0.05)
    inside = _ellipse(x * (1.0 + face.jaw * np.maximum(y, 0.0)), y, 0.5, face.half_height)
    texture = sum(
        weight * _noise_field(rng, x, y, cell)
        for weight, cell in ((0.040, 0.16), (0.045, 0.07), (0.040, 0.035), (0.02, 0.016))
    )
    shading = 1.0 - 0.22 * (inside + 1.0) ** 3 + light_x * x + light_y * y
    hairline = _edge((rng.uniform(-0.47, -0.40) + rng.uniform(0.0, 0.35) * x**2) - y, 0.015)
    picture = _paint(picture, skin * shading * (1.0 + texture), _edge(inside, 0.015) * hairline)

    picture = picture * (1.0 - _folds(face, x, y, rng))
    picture = _draw_nose(picture, face, x, y, rng)
    for side in (1.0, -1.0):
        picture = _draw_eye(picture, face, side * x, y, rng.uniform(0.15, 0.35))
        picture = _draw_brow(picture, face, side * x, y, min(hair * 1.2, 0.8 * skin))
    picture = _draw_mouth(picture, face, x, y, skin * rng.uniform(0.62, 0.8))
    for _ in range(rng.integers(2, 7)):
        spot = _blob(x, y, rng.uniform(-0.38, 0.38), rng.uniform(-0.4, 0.5), rng.uniform(0.006, 0.014))
        picture = picture * (1.0 - rng.uniform(0.15, 0.45) * spot)
    return np.clip(picture, 0.02, 0.98)


def blur(picture: np.ndarray, sigma_pixels: float) -> np.ndarray:
    """Blur with a Gaussian, edges repeated; 0 leaves the picture as it is."""
    if sigma_pixels <= 0.0:
        return picture
    radius = int(np.ceil(3.0 * sigma_pixels))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma_pixels) ** 2)
    taps /= taps.sum()
    for _ in range(2):
        padded = np.pad(picture, ((radius, radius), (0, 0)), mode="edge")
        picture = sum(tap * padded[i : i + len(picture)] for i, tap in enumerate(taps)).T
    return picture


def _draw_eye(picture: np.ndarray, face: Geometry, x: np.ndarray, y: np.ndarray, iris: float) -> np.ndarray:
    """Draw the eye at x > 0: the ball inside an almond, iris, pupil, glint, and the dark line of the upper lid."""
    u = (x - face.eye_x) / face.eye_width
    opening = face.eye_height * np.maximum(1.0 - u**2, 0.0)
    almond = _edge(np.maximum(face.eye_y - opening - y, y - face.eye_y - 0.8 * opening), 0.004) * _edge(
        np.abs(u) - 1.0, 0.03
    )
    distance = np.hypot(x - face.eye_x, y - face.eye_y)
    ball = 0.80 - 0.25 * np.abs(u)
    ball = _paint(ball, iris, _edge(distance - 1.05 * face.eye_height, 0.004))
    ball = _paint(ball, 0.05, _edge(distance - 0.45 * face.eye_height, 0.004))
    ball = _paint(ball, 0.95, _blob(x, y, face.eye_x - 0.012, face.eye_y - 0.010, 0.007))
    picture = _paint(picture, ball, almond)
    lid = np.exp(-0.5 * ((y - face.eye_y + opening) / 0.009) ** 2) * _edge(np.abs(u) - 1.05, 0.04)
    crease = np.exp(-0.5 * ((y - face.eye_y + 1.25 * opening + 0.022) / 0.008) ** 2) * _edge(np.abs(u) - 1.0, 0.06)
    lower = np.exp(-0.5 * ((y - face.eye_y - 0.8 * opening) / 0.006) ** 2) * _edge(np.abs(u) - 0.95, 0.05)
    return picture * (1.0 - 0.75 * lid) * (1.0 - 0.25 * crease) * (1.0 - 0.35 * lower)


def _draw_brow(picture: np.ndarray, face: Geometry, x: np.ndarray, y: np.ndarray, value: float) -> np.ndarray:
    """Draw the brow at x > 0: an arch from above the inner eye corner to beyond the outer one, thinner outside."""
    u = (x - 0.075) / 0.26
    centre = face.brow_y - face.brow_arch * np.sin(np.pi * np.clip(u, 0.0, 1.0) ** 1.4) + 0.012 * u
    thickness = face.brow_thickness * np.clip(1.15 - 0.7 * u, 0.2, 1.2)
    mask = np.exp(-0.5 * ((y - centre) / (0.75 * thickness)) ** 4) * _edge(np.abs(u - 0.5) - 0.5, 0.04)
    return _paint(picture, value, 0.9 * mask)


def _draw_nose(
    picture: np.ndarray, face: Geometry, x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Draw the shaded sides of the nose, its tip, wings and nostrils."""
    along = np.clip((y - face.eye_y) / (face.nose_y - face.eye_y), 0.0, 1.0)
    length = _edge(face.eye_y - 0.04 - y, 0.02) * _edge(y - face.nose_y + 0.01, 0.02)
    width = 0.035 + (face.nose_width - 0.035) * along**2
    dark_side = rng.choice([-1.0, 1.0])
    for side in (1.0, -1.0):
        depth = 0.20 if side == dark_side else 0.09
        picture = picture * (1.0 - depth * np.exp(-0.5 * ((side * x - width) / 0.018) ** 2) * length)
        wing = np.abs(np.hypot((side * x - 0.75 * face.nose_width) / 0.035, (y - face.nose_y + 0.012) / 0.035) - 1.0)
        outer = _edge(0.75 * face.nose_width - side * x, 0.01)
        picture = picture * (1.0 - 0.28 * np.exp(-0.5 * (wing / 0.28) ** 2) * outer)
        nostril = np.exp(
            -0.5 * (((side * x - 0.55 * face.nose_width) / 0.020) ** 2 + ((y - face.nose_y - 0.014) / 0.010) ** 2)
        )
        picture = picture * (1.0 - 0.6 * nostril)
    highlight = 0.08 * np.exp(-0.5 * (x / 0.016) ** 2) * length + 0.07 * _blob(x, y, 0.0, face.nose_y - 0.03, 0.025)
    return picture * (1.0 + highlight)


def _draw_mouth(picture: np.ndarray, face: Geometry, x: np.ndarray, y: np.ndarray, lip: float) -> np.ndarray:
    """Draw both lips, the line between them and the shadow below."""
    u = x / face.mouth_width
    taper = np.maximum(1.0 - u**2, 0.0)
    line = face.mouth_y + 0.008 * np.cos(2.2 * np.pi * u) * taper
    dip = 1.0 - 0.30 * np.exp(-0.5 * (u / 0.14) ** 2)
    upper = _edge(np.maximum(line - face.lip_height * taper**0.7 * dip - y, y - line), 0.006)
    lower = _edge(np.maximum(line - y, y - line - 1.25 * face.lip_height * taper**0.7), 0.006)
    picture = _paint(picture, 0.88 * lip, 0.75 * upper * _edge(np.abs(u) - 1.0, 0.03))
    picture = _paint(picture, lip * 1.06, 0.7 * lower * _edge(np.abs(u) - 1.0, 0.03))
    gap = np.exp(-0.5 * ((y - line) / 0.008) ** 2) * _edge(np.abs(u) - 1.04, 0.03)
    corners = _blob(np.abs(x), y, face.mouth_width + 0.006, face.mouth_y + 0.002, 0.014)
    shadow = np.exp(-0.5 * ((x / 0.09) ** 2 + ((y - face.mouth_y - 1.8 * face.lip_height - 0.01) / 0.016) ** 2))
    return picture * (1.0 - 0.7 * gap) * (1.0 - 0.45 * corners) * (1.0 - 0.22 * shadow)


def _folds(face: Geometry, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darkness of nasolabial folds, bags under the eyes, forehead lines and chin crease; `[H, W]` in [0, 1)."""
    side = np.abs(x)
    along = np.clip((y - face.nose_y + 0.02) / (face.mouth_y - face.nose_y + 0.02), 0.0, 1.0)
    fold_x = face.nose_width + 0.03 + (face.mouth_width - face.nose_width + 0.02) * along**0.9
    reach = _edge(face.nose_y - 0.02 - y, 0.015) * _edge(y - face.mouth_y - 0.005, 0.015)
    nasolabial = rng.uniform(0.12, 0.25) * np.exp(-0.5 * ((side - fold_x) / 0.014) ** 2) * reach
    u = (side - face.eye_x) / (1.15 * face.eye_width)
    bag_y = face.eye_y + 0.085 - 0.035 * u**2
    bags = rng.uniform(0.08, 0.2) * np.exp(-0.5 * ((y - bag_y) / 0.014) ** 2) * _edge(np.abs(u) - 0.9, 0.08)
    cheek = 0.10 * np.exp(-0.5 * (((side - 0.34) / 0.07) ** 2 + ((y - 0.14) / 0.06) ** 2))
    lines = np.zeros(np.broadcast_shapes(x.shape, y.shape))
    for _ in range(2):
        level = face.brow_y - rng.uniform(0.07, 0.15)
        bend = level + 0.02 * np.cos(6.0 * x + rng.uniform(0, 6))
        lines += rng.uniform(0.05, 0.15) * np.exp(-0.5 * ((y - bend) / 0.008) ** 2) * _edge(side - 0.27, 0.04)
    chin_y = face.mouth_y + 0.125 + 0.35 * x**2
    chin = rng.uniform(0.10, 0.2) * np.exp(-0.5 * ((y - chin_y) / 0.016) ** 2) * _edge(side - 0.13, 0.03)
    glabella = rng.uniform(0.05, 0.15) * np.exp(-0.5 * ((side - 0.035) / 0.009) ** 2)
    glabella = glabella * np.exp(-0.5 * ((y - face.brow_y - 0.01) / 0.04) ** 2)
    return np.clip(nasolabial + bags + cheek + lines + chin + glabella, 0.0, 0.6)


def _noise_field(rng: np.random.Generator, x: np.ndarray, y: np.ndarray, cell: float) -> np.ndarray:
    """Smooth noise, about unit variance: a Gaussian grid of `cell` face widths, cubic between its nodes; `[H, W]`."""
    rows, columns = _interpolation(y.ravel() / cell), _interpolation(x.ravel() / cell)
    grid = rng.standard_normal((rows.shape[1], columns.shape[1]))
    return 1.5 * (rows @ grid @ columns.T)


def _interpolation(positions: np.ndarray) -> np.ndarray:
    """Weights `[positions, nodes]` with which smooth-step blending reads a grid of unit spacing that spans them."""
    first = np.floor(positions.min())
    nodes = int(np.ceil(positions.max()) - first) + 1
    distance = np.clip(np.abs(positions[:, None] - first - np.arange(nodes)[None, :]), 0.0, 1.0)
    return 1.0 - distance * distance * (3.0 - 2.0 * distance)


def _edge(signed_distance: np.ndarray, softness: float) -> np.ndarray:
    """1 inside (negative distance), 0 outside, with a soft step between."""
    return 0.5 - 0.5 * np.tanh(signed_distance / softness)


def _ellipse(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    """Radius minus 1 in units of the ellipse: negative inside, -1 in the middle."""
    return np.sqrt((x / half_width) ** 2 + (y / half_height) ** 2) - 1.0


def _blob(x: np.ndarray, y: np.ndarray, centre_x: float, centre_y: float, radius: float) -> np.ndarray:
    return np.exp(-0.5 * (((x - centre_x) / radius) ** 2 + ((y - centre_y) / radius) ** 2))


def _paint(picture: np.ndarray, value: np.ndarray | float, mask: np.ndarray) -> np.ndarray:
    return picture + mask * (value - picture)
