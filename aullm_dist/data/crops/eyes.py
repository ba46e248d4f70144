"""Computes the square around two eyes, as every crop that knows them cuts it."""

import math

from aullm_dist.data.crops.base import Region

_DISTANCE, _HEIGHT = 0.42, 0.38
"""Of the square's side (ours): from eye to eye, and from the square's top to the eyes. Forehead and chin are inside."""


def region_around_eyes(one: tuple[float, float], other: tuple[float, float], size: tuple[int, int]) -> Region:
    """Return a square that holds forehead and chin, turned until the eyes are level.

    Args:
        one: x, y of an eye in pixels.
        other: of the other eye, at least a pixel apart.
        size: width and height of the frame.
    """
    width, height = size
    (x1, y1), (x2, y2) = sorted([one, other])
    angle = math.atan2(y2 - y1, x2 - x1)
    side = math.hypot(x2 - x1, y2 - y1) / _DISTANCE
    below = (0.5 - _HEIGHT) * side
    # Down the face, which the turn makes straight down.
    x = (x1 + x2) / 2 - below * math.sin(angle)
    y = (y1 + y2) / 2 + below * math.cos(angle)
    half = side / 2
    return Region((x - half) / width, (y - half) / height, (x + half) / width, (y + half) / height, math.degrees(angle))
