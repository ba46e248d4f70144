"""Computes the input of the visual stream: gray frames of a clip, their flow against the first, or both.

A view is one array `[C, H, W]`, whatever the stream, so that nothing but the visual backbone looks into it. It is made
of the frames as they are when everything else has happened to them: a cut, an augmentation, an intervention. The flow
of a mirrored clip is thus the mirrored flow, and that of a neutral twin is the flow of the twin's own jitter and noise.
"""

from typing import Literal

import numpy as np

from aullm_dist.data.clips import Clip, apex_index, sample_frames
from aullm_dist.data.flow import FLOW_CHANNELS, RAW_FLOW, clip_flow, strain_of

Visual = Literal["led", "flow", "both"]
Stream = Literal["led", "flow", "both", "onset_apex"]
"""What a network may be given; `onset_apex`: the flow from the first frame to the apex as one image (baselines)."""
IMAGE_SIDE, _IMAGE_CHANNELS = 64, 3


def view_channels(visual: Visual, num_frames: int) -> int:
    """Return C of a view: `led` T gray frames; `flow` T - 1 times u, v; `both` the frames, then the flow."""
    maps = FLOW_CHANNELS * (num_frames - 1)
    return {"led": num_frames, "flow": maps, "both": num_frames + maps}[visual]


def view_shape(stream: Stream, num_frames: int, image_size: int) -> tuple[int, int, int]:
    """Return the shape (C, H, W) of a view of clips of this size."""
    if stream == "onset_apex":
        return _IMAGE_CHANNELS, IMAGE_SIDE, IMAGE_SIDE
    return view_channels(stream, num_frames), image_size, image_size


def frames_for(clip: Clip, num_frames: int, stream: Stream, cut: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Return the frames `[T, H, W]` float32 in 0..1 of which a view is made; T is 2 for `onset_apex`.

    Those are frames sampled over the clip (`sample_frames`), or the first frame and the apex (`apex_index`).
    """
    if stream == "onset_apex":
        return clip.frames[[0, apex_index(clip)[0]]].astype(np.float32) / np.float32(255.0)
    return sample_frames(clip, num_frames, cut)


def onset_apex_image(pair: np.ndarray) -> np.ndarray:
    """Return u, v and strain of the flow between two frames `[2, H, W]` as an image `[3, 64, 64]` float32 in 0..1.

    Each channel is stretched to 0..1 by its own least and largest value; one without any difference is 0. The flow is
    computed at the size of the frames as they are (`RAW_FLOW`) and resized afterwards.

    Source: field knowledge of SSSNet on optical flow.
    """
    u, v = clip_flow(pair, RAW_FLOW)[0]
    maps = np.stack([u, v, strain_of(u, v)])
    low, high = maps.min(axis=(1, 2), keepdims=True), maps.max(axis=(1, 2), keepdims=True)
    spread = high - low
    image = np.divide(maps - low, spread, out=np.zeros_like(maps), where=spread > 0)
    if image.shape[1:] == (IMAGE_SIDE, IMAGE_SIDE):
        return image
    import cv2

    return np.stack([cv2.resize(m, (IMAGE_SIDE, IMAGE_SIDE), interpolation=cv2.INTER_LINEAR) for m in image])


def view_of(frames: np.ndarray, visual: Stream) -> np.ndarray:
    """Return the view `[C, H, W]` float32 of sampled frames `[T, H, W]` float32 in 0..1.

    Training, evaluation and prediction all call this function.
    """
    if visual == "onset_apex":
        return onset_apex_image(frames)
    if visual == "led":
        return frames
    maps = clip_flow(frames).reshape(-1, *frames.shape[1:])
    return maps if visual == "flow" else np.concatenate([frames, maps])
