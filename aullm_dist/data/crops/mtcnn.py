"""Implements the crop `mtcnn`: the largest face that MTCNN finds in the onset frame, its eyes turned level."""

import numpy as np
from PIL import Image

from aullm_dist.data.crops.base import Crop, NoRegion, Region
from aullm_dist.data.crops.eyes import region_around_eyes

_SMALLEST = 0.2
"""Share of the frame's shorter side below which a find is no face of a recording made for expressions."""


class MtcnnCrop(Crop):
    """Finds faces that are turned or tilted too; of several faces it takes the largest box."""

    identity = "mtcnn"

    def fit(self, onset: Image.Image, clip: str) -> Region:
        """Return the square around the eyes that holds forehead and chin, as the crop `landmarks` cuts it."""
        from aullm_dist.data.crops.detector import find_faces

        width, height = onset.size
        faces = find_faces(np.asarray(onset.convert("RGB")), round(_SMALLEST * min(width, height)))
        if not faces:
            raise NoRegion(
                "no face found in the onset frame; allowed: a face whose eyes can be seen, a fifth of it or more"
            )
        largest = max(faces, key=lambda face: float(np.prod(face.box[2:] - face.box[:2])))
        (x1, y1), (x2, y2) = largest.landmarks[:2].tolist()
        if abs(x2 - x1) + abs(y2 - y1) < 1:
            raise NoRegion("the eyes of the face in the onset frame cannot be distinguished")
        return region_around_eyes((x1, y1), (x2, y2), onset.size)
