"""Crops frames: crops by name, each fitted once per clip, on its onset frame.

A crop found frame by frame would jitter by more than a micro-expression moves, so a crop sees the onset frame alone
and what it finds there is applied to every frame of the clip. Preparation and prediction take crops from here and from
nowhere else. A crop is written as `NAME` or `NAME:ARGUMENT`; other packages add theirs as entry points of the group
`aullm_dist.crops`.
"""

from aullm_dist.data.crops.base import Crop, NoRegion, Region
from aullm_dist.data.crops.registry import ENTRY_POINTS, UNRECORDED, crop_for, crop_names, get_crop, recorded_crop

__all__ = [
    "ENTRY_POINTS",
    "UNRECORDED",
    "Crop",
    "NoRegion",
    "Region",
    "crop_for",
    "crop_names",
    "get_crop",
    "recorded_crop",
]
