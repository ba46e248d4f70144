"""Implements the crop `cascade`: the largest frontal face that OpenCV's Haar cascade finds in the onset frame."""

from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aullm_dist.data.crops.base import Crop, NoRegion, Region

_CASCADE = "haarcascade_frontalface_alt2.xml"
_SMALLEST = 0.2
"""Share of the frame's shorter side below which a find is no face of a recording made for expressions."""
_MARGIN = 0.1
"""Share of the found square's side that is added on each side (ours): the cascade cuts chin and forehead close."""


class CascadeCrop(Crop):
    """Finds an upright face seen from the front; it knows no landmarks and turns nothing."""

    identity = "cascade"

    def fit(self, onset: Image.Image, clip: str) -> Region:
        """Return the square around the largest face, moved into the frame where its margin would leave it."""
        gray = np.asarray(onset.convert("L"))
        height, width = gray.shape
        smallest = max(24, round(_SMALLEST * min(width, height)))
        faces = self._classifier.detectMultiScale(gray, scaleFactor=1.05, minNeighbors=4, minSize=(smallest, smallest))
        if len(faces) == 0:
            raise NoRegion(
                "no face found in the onset frame; allowed: an upright face from the front, at least a fifth of it"
            )
        x, y, side = max(((int(x), int(y), int(w)) for x, y, w, _ in faces), key=lambda face: (face[2], face))
        wide = min(side * (1 + 2 * _MARGIN), width, height)
        left = min(max(x + side / 2 - wide / 2, 0.0), width - wide)
        top = min(max(y + side / 2 - wide / 2, 0.0), height - wide)
        return Region(left / width, top / height, (left + wide) / width, (top + wide) / height)

    @cached_property
    def _classifier(self) -> Any:
        import cv2

        classifier = cv2.CascadeClassifier(str(Path(import_module("cv2.data").haarcascades) / _CASCADE))
        assert not classifier.empty(), f"OpenCV came without {_CASCADE}"
        return classifier
