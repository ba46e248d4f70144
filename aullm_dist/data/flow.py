"""Computes the optical flow of a clip: how far each sampled frame has moved against the first.

What is computed depends on the clip alone: no statistic of other clips enters, and no apex is needed. One function
serves loaders, evaluation and prediction. OpenCV computes it on one thread, so that loader processes do not compete.

Units: displacements are pixels of the frames as given (`[H, W]`), positive to the right (u) and down (v): what lies at
(x, y) in the first frame lies at (x + u, y + v) in the later one. Strain has no unit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FLOW_CHANNELS = 2
"""Channels of a flow map: u, v."""


@dataclass(frozen=True, slots=True)
class FlowSettings:
    """How flow is computed.

    Attributes:
        method: `farneback` fits a quadratic around each pixel (dense, no rounding of gray levels); `dis` is dense
            inverse search, on frames rounded to 8 bits.
        upsample: frames are enlarged this many times before, and the flow is shrunk again: movements below a pixel need
            neighbourhoods that are fine against the face.
        window: side of the averaging window of Farneback's method, in pixels of the enlarged frames.
        stabilise: movement of the whole head that is subtracted: `none`, the `median` displacement, or an `affine` map
            fitted to the displacements of all pixels, twice, without those that fit it badly.
        lighting: frames are divided by their local mean first, a Gaussian of this share of their side, so that light
            that falls unevenly or changes over time is not taken for movement; 0 leaves them as they are.
    """

    method: Literal["farneback", "dis"] = "farneback"
    upsample: int = 2
    window: int = 15
    stabilise: Literal["none", "median", "affine"] = "none"
    lighting: float = 1 / 16


DEFAULT_FLOW = FlowSettings()
RAW_FLOW = FlowSettings(lighting=0)
"""Of the frames as they are, as the field has it."""

# Farneback's method: levels of the pyramid, passes at each, side and width of the polynomial's neighbourhood. Further
# passes change nothing (docs/model.md), since movements are small; without the pyramid a head that moves by 3 pixels is
# lost.
# Gray levels: what is darker than `_DARK` is noise, and is not brought up to the level of a face.
_EVEN_LEVEL, _DARK = np.float32(102.0), np.float32(4.0)

_LEVELS, _ITERATIONS, _NEIGHBOURS, _SIGMA = 3, 1, 5, 1.1


def clip_flow(frames: np.ndarray, settings: FlowSettings = DEFAULT_FLOW) -> np.ndarray:
    """Return the flow of every frame but the first against the first frame.

    Args:
        frames: `[T, H, W]` float in 0..1 or uint8 in 0..255; two frames or more.
        settings: how flow is computed.

    Returns:
        `[T-1, 2, H, W]` float32: u and v in pixels of `frames`. Equal frames give exactly 0.

    Source: Farneback (2003), "Two-frame motion estimation based on polynomial expansion"; Kroeger et al. (2016), "Fast
    optical flow using dense inverse search"; both as in OpenCV.
    """
    scaled = frames.astype(np.float32)
    if frames.dtype != np.uint8:
        scaled = scaled * np.float32(255.0)
    with _one_thread():
        if settings.lighting:
            scaled = np.stack([_evenly_lit(frame, settings.lighting) for frame in scaled])
        large = [_resized(frame, settings.upsample) for frame in scaled]
        maps = np.stack([_displacement(large[0], frame, settings, frames.shape[1:]) for frame in large[1:]])
    # A frame equal to the first has not moved, whatever the method's borders make of it.
    maps *= (scaled[1:] != scaled[:1]).any(axis=(1, 2), keepdims=True)[..., None]
    if settings.stabilise == "median":
        maps -= np.median(maps, axis=(1, 2), keepdims=True)
    elif settings.stabilise == "affine":
        maps = np.stack([flow - _affine_part(flow) for flow in maps])
    return np.ascontiguousarray(np.moveaxis(maps, -1, 1), dtype=np.float32)


def strain_of(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the size of the strain tensor of displacements `[..., H, W]`: `sqrt(e_xx^2 + e_yy^2 + 2 e_xy^2)`.

    `e = (grad + grad^T) / 2` by central differences: a translation and a small rotation give 0. Without a unit.

    Source: field knowledge of optical strain; unlike some public code, which squares u_y and v_x each by itself, this
    is the norm of the symmetric tensor, so that a turning head is not taken for strain.
    """
    u_y, u_x = np.gradient(u, axis=(-2, -1))
    v_y, v_x = np.gradient(v, axis=(-2, -1))
    return np.sqrt(u_x**2 + v_y**2 + 0.5 * (u_y + v_x) ** 2)


@contextmanager
def _one_thread() -> Iterator[None]:
    import cv2

    before = cv2.getNumThreads()
    if before != 1:
        cv2.setNumThreads(1)
    try:
        yield
    finally:
        if before != 1:
            cv2.setNumThreads(before)


def _evenly_lit(frame: np.ndarray, share: float) -> np.ndarray:
    """Return a frame `[H, W]` of gray levels divided by its local mean, at the mean gray level `_EVEN_LEVEL`."""
    import cv2

    mean = cv2.GaussianBlur(frame, (0, 0), share * min(frame.shape))
    return frame * (_EVEN_LEVEL / (mean + _DARK))


def _resized(frame: np.ndarray, factor: int) -> np.ndarray:
    import cv2

    if factor == 1:
        return frame
    height, width = frame.shape
    return cv2.resize(frame, (width * factor, height * factor), interpolation=cv2.INTER_CUBIC)


def _displacement(first: np.ndarray, frame: np.ndarray, settings: FlowSettings, shape: tuple[int, ...]) -> np.ndarray:
    """Return the displacements `[H, W, 2]` in pixels of a frame of `shape`, from enlarged frames."""
    import cv2

    fresh: Any = None  # the stubs do not say so, but None makes a new array; an array would be where DIS starts from
    if settings.method == "dis":
        method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        before, now = (np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in (first, frame))
        flow = np.asarray(method.calc(before, now, fresh))
    else:
        flow = np.asarray(
            cv2.calcOpticalFlowFarneback(
                first, frame, fresh, 0.5, _LEVELS, settings.window, _ITERATIONS, _NEIGHBOURS, _SIGMA, 0
            )
        )
    if settings.upsample == 1:
        return flow
    return cv2.resize(flow, (shape[1], shape[0]), interpolation=cv2.INTER_AREA) / np.float32(settings.upsample)


def _affine_part(flow: np.ndarray) -> np.ndarray:
    """Return the affine map of the position that fits displacements `[H, W, 2]` best, without what stands out."""
    height, width = flow.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    terms = np.stack([np.ones_like(x), x, y], axis=-1).reshape(-1, 3)
    target = flow.reshape(-1, 2).astype(np.float64)
    fitted = terms @ np.linalg.lstsq(terms, target, rcond=None)[0]
    error = np.linalg.norm(target - fitted, axis=1)
    kept = error <= np.median(error)
    fitted = terms @ np.linalg.lstsq(terms[kept], target[kept], rcond=None)[0]
    return fitted.reshape(flow.shape).astype(flow.dtype)
