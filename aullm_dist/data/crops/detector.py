"""Finds faces and five landmarks of each with MTCNN, three small networks, in numpy alone.

Source: Zhang et al., "Joint Face Detection and Alignment using Multitask Cascaded Convolutional Networks", 2016;
weights, thresholds and order of operations are those of facenet-pytorch 2.6.0. That package itself pins an old torch;
the networks are so small that numpy runs them, and the worker processes of a preparation need not import torch.

Shapes: n boxes, C channels, H and W pixels. Boxes are left, top, right, bottom in pixels.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WEIGHTS = Path(__file__).with_name("mtcnn.safetensors")
_THRESHOLDS = (0.6, 0.7, 0.7)
_FACTOR = 0.709
"""From one scale of the pyramid to the next."""
_CELL, _STRIDE = 12, 2
"""Pixels that P-Net sees at once, and from one place to the next."""
_SMALLEST = 20
"""Pixels of the smallest face that the networks were trained on."""


@dataclass(frozen=True, slots=True)
class Face:
    """A face in a picture: its box, how sure the detector is, and eyes, nose and mouth corners `[5, 2]` as x, y."""

    box: np.ndarray
    score: float
    landmarks: np.ndarray


def find_faces(picture: np.ndarray, smallest: int = _SMALLEST) -> list[Face]:
    """Return the faces of a picture, the surest first.

    Args:
        picture: RGB `[H, W, 3]` uint8.
        smallest: side of the smallest face that is looked for, in pixels.
    """
    image = np.ascontiguousarray(picture.transpose(2, 0, 1), dtype=np.float32)
    boxes = _proposals(image, max(smallest, _SMALLEST))
    boxes, _ = _refined(image, boxes, "rnet", 24, _THRESHOLDS[1])
    boxes, points = _refined(image, boxes, "onet", 48, _THRESHOLDS[2])
    return [Face(box[:4], float(box[4]), own) for box, own in zip(boxes, points, strict=True)]


def _proposals(image: np.ndarray, smallest: int) -> np.ndarray:
    """Return squares that may hold a face `[n, 5]`, with their scores: P-Net over a pyramid of the picture."""
    height, width = image.shape[1:]
    scale, found = _CELL / smallest, []
    while min(height, width) * scale >= _CELL:
        small = _resized(image, int(height * scale + 1), int(width * scale + 1))
        shift, score = _pnet(_normalised(small)[None])
        rows, columns = np.nonzero(score[0] >= _THRESHOLDS[0])
        corners = np.stack([columns, rows], 1) * _STRIDE
        first, last = np.floor((corners + 1) / scale), np.floor((corners + _CELL) / scale)
        boxes = np.concatenate([first, last, score[0, rows, columns, None], shift[0][:, rows, columns].T], 1)
        found.append(boxes[_kept(boxes, 0.5)])
        scale *= _FACTOR
    boxes = np.concatenate(found) if found else np.empty((0, 9))
    boxes = boxes[_kept(boxes, 0.7)]
    side = np.tile(boxes[:, 2:4] - boxes[:, :2], 2)
    return np.concatenate([boxes[:, :4] + boxes[:, 5:9] * side, boxes[:, 4:5]], 1)


def _refined(
    image: np.ndarray, boxes: np.ndarray, network: str, size: int, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes `[n, 5]` that a network takes for faces, moved as it says, and their landmarks `[n, 5, 2]`."""
    boxes = _squared(boxes)
    pieces, inside = _pieces(image, boxes, size)
    boxes = boxes[inside]
    if not len(boxes):
        return np.empty((0, 5)), np.empty((0, 5, 2))
    shift, score, points = (_rnet if network == "rnet" else _onet)(_normalised(pieces))
    sure = score > threshold
    boxes, shift, points = np.concatenate([boxes[:, :4], score[:, None]], 1)[sure], shift[sure], points[sure]
    side = boxes[:, 2:4] - boxes[:, :2] + 1
    landmarks = points.reshape(-1, 2, 5).transpose(0, 2, 1) * side[:, None] + boxes[:, None, :2] - 1
    moved = np.concatenate([boxes[:, :4] + shift * np.tile(side, 2), boxes[:, 4:]], 1)
    if network == "rnet":
        # Chosen before they are moved, as the weights' own code does.
        kept = _kept(boxes, 0.7)
    else:
        kept = _kept(moved, 0.7, of_smaller=True)
    return moved[kept], landmarks[kept]


def _pieces(image: np.ndarray, boxes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut boxes out, each `[3, size, size]`, as far as they lie in the picture; and return which of them do."""
    height, width = image.shape[1:]
    left, top, right, bottom = np.trunc(boxes[:, :4]).astype(int).T
    left, top, right, bottom = left.clip(1), top.clip(1), right.clip(None, width), bottom.clip(None, height)
    inside = (bottom > top - 1) & (right > left - 1)
    cut = [
        _resized(image[:, top[i] - 1 : bottom[i], left[i] - 1 : right[i]], size, size) for i in np.flatnonzero(inside)
    ]
    return np.stack(cut) if cut else np.empty((0, 3, size, size), np.float32), inside


def _squared(boxes: np.ndarray) -> np.ndarray:
    """Return boxes grown to squares about their centres."""
    sides = boxes[:, 2:4] - boxes[:, :2]
    longest = sides.max(1, keepdims=True)
    first = boxes[:, :2] + sides / 2 - longest / 2
    return np.concatenate([first, first + longest, boxes[:, 4:]], 1)


def _kept(boxes: np.ndarray, overlap: float, *, of_smaller: bool = False) -> np.ndarray:
    """Return the indices of boxes that no surer one covers (non-maximum suppression), the surest first.

    Args:
        boxes: `[n, 5 or more]`, the fifth column being the score.
        overlap: from which share on a box is covered.
        of_smaller: the share is of the smaller box, pixels counted at both ends, and not of what both cover.
    """
    more = 1 if of_smaller else 0
    area = np.prod(boxes[:, 2:4] - boxes[:, :2] + more, 1)
    order = np.argsort(-boxes[:, 4], kind="stable")
    kept = []
    while len(order):
        first, others = order[0], order[1:]
        kept.append(first)
        low = np.maximum(boxes[first, :2], boxes[others, :2])
        high = np.minimum(boxes[first, 2:4], boxes[others, 2:4])
        shared = np.prod((high - low + more).clip(0), 1)
        whole = np.minimum(area[first], area[others]) if of_smaller else area[first] + area[others] - shared
        order = others[shared <= overlap * whole]
    return np.array(kept, dtype=int)


# Networks: each returns shifts of box edges `[..., 4]` in parts of the box, and the probability of a face.


@functools.cache
def _weights() -> Mapping[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(WEIGHTS)


def _pnet(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return shifts `[n, 4, h, w]` and probabilities `[n, h, w]` at every place of pictures `[n, 3, H, W]`."""
    x = _pooled(_conv(x, "pnet", 1), 2)
    x = _conv(_conv(x, "pnet", 2), "pnet", 3)
    score = _softmax(_conv(x, "pnet", "4_1"), 1)[:, 1]
    return _conv(x, "pnet", "4_2"), score


def _rnet(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return shifts `[n, 4]`, probabilities `[n]` and no landmarks `[n, 10]` of pictures `[n, 3, 24, 24]`."""
    x = _pooled(_conv(x, "rnet", 1), 3)
    x = _conv(_pooled(_conv(x, "rnet", 2), 3), "rnet", 3)
    x = _dense(x.transpose(0, 3, 2, 1).reshape(len(x), -1), "rnet", 4)
    return _dense(x, "rnet", "5_2"), _softmax(_dense(x, "rnet", "5_1"), 1)[:, 1], np.zeros((len(x), 10), np.float32)


def _onet(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return shifts `[n, 4]`, probabilities `[n]` and landmarks `[n, 10]`, x first, of `[n, 3, 48, 48]`."""
    x = _pooled(_conv(x, "onet", 1), 3)
    x = _pooled(_conv(x, "onet", 2), 3)
    x = _conv(_pooled(_conv(x, "onet", 3), 2), "onet", 4)
    x = _dense(x.transpose(0, 3, 2, 1).reshape(len(x), -1), "onet", 5)
    return _dense(x, "onet", "6_2"), _softmax(_dense(x, "onet", "6_1"), 1)[:, 1], _dense(x, "onet", "6_3")


def _conv(x: np.ndarray, network: str, layer: int | str) -> np.ndarray:
    """Convolve `[n, C, H, W]` without padding, with the PReLU behind it where the network has one."""
    weight = _weights()[f"{network}.conv{layer}.weight"]
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(2, 3))
    y = np.tensordot(windows, weight, axes=((1, 4, 5), (1, 2, 3))).transpose(0, 3, 1, 2)
    y = y + _weights()[f"{network}.conv{layer}.bias"][:, None, None]
    return _prelu(y, network, layer, (-1, 1, 1))


def _dense(x: np.ndarray, network: str, layer: int | str) -> np.ndarray:
    weights = _weights()
    y = x @ weights[f"{network}.dense{layer}.weight"].T + weights[f"{network}.dense{layer}.bias"]
    return _prelu(y, network, layer, (-1,))


def _prelu(y: np.ndarray, network: str, layer: int | str, shape: tuple[int, ...]) -> np.ndarray:
    slope = _weights().get(f"{network}.prelu{layer}.weight")
    return y if slope is None else np.where(y > 0, y, y * slope.reshape(shape))


def _pooled(x: np.ndarray, size: int) -> np.ndarray:
    """Return maxima over squares of `size`, two pixels apart; what the last one lacks is left out of it."""
    extra = [-(length - size) % 2 for length in x.shape[2:]]
    x = np.pad(x, ((0, 0), (0, 0), (0, extra[0]), (0, extra[1])), constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))[:, :, ::2, ::2].max((4, 5))


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return `[C, height, width]`: each pixel is the mean of those of `[C, H, W]` that it covers."""
    for axis, size in ((1, height), (2, width)):
        length = image.shape[axis]
        places = np.arange(size)
        first, last = places * length // size, -(-(places + 1) * length // size)
        sums = np.cumsum(image, axis, dtype=np.float64)
        before = np.concatenate([np.zeros_like(sums.take([0], axis)), sums], axis)
        means = before.take(last, axis) - before.take(first, axis)
        image = means / (last - first).reshape((-1, 1) if axis == 1 else (-1,))
    return image.astype(np.float32)


def _normalised(x: np.ndarray) -> np.ndarray:
    return (x - 127.5) * np.float32(0.0078125)


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)
