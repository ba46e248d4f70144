"""Turns flow maps into texture cells: a shallow 2D-CNN, the same for the flow of every frame, and a pooling over time.

Kernels, pooling and channels are those of the LED stream, so that a cell of either lies at the same place of the face
and everything behind the visual backbone keeps its shapes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from aullm_dist.data.flow import FLOW_CHANNELS

_GROUPS = 8
_FIRST_CHANNELS = 32
_CELL_CHANNELS = 64
_TIME_POOL, _TIME_STRIDE = 3, 2


class FlowCells(nn.Module):
    """Texture cells from flow.

    Displacements are multiplied by a fixed gain (ours) that brings them to the order of 1: no statistic of a clip
    enters, so that a clip without movement stays small instead of being blown up to the size of one with movement.
    Pixels are counted as those of a face of `REFERENCE_SIDE` pixels.

    Args:
        num_frames: frames T of a clip.
        image_size: side of a frame in pixels.
        attention: scales the channels of maps `[V, C, T, H, W]`.
        dropout: dropout after the first block.
    """

    GAIN = 10.0
    REFERENCE_SIDE = 64
    NORM_EPS = 0.1

    def __init__(self, num_frames: int, image_size: int, attention: nn.Module, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.pairs = num_frames - 1
        self.gain = self.GAIN * self.REFERENCE_SIDE / image_size
        # No biases: a clip without movement then stays at 0 up to the norms.
        self.conv1 = nn.Conv2d(FLOW_CHANNELS, _FIRST_CHANNELS, 5, bias=False)
        self.norm1 = nn.GroupNorm(_GROUPS, _FIRST_CHANNELS, eps=self.NORM_EPS)
        self.conv2 = nn.Conv2d(_FIRST_CHANNELS, _CELL_CHANNELS, 3, bias=False)
        self.norm2 = nn.GroupNorm(_GROUPS, _CELL_CHANNELS, eps=self.NORM_EPS)
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")

    def forward(self, maps: Tensor) -> Tensor:
        """Return cells `[V, C, time, rows, columns]` of flow maps `[V, 2 (T-1), H, W]` (u, v of each frame)."""
        maps = maps.unflatten(1, (self.pairs, FLOW_CHANNELS)) * self.gain
        x = F.max_pool2d(self.conv1(maps.flatten(0, 1)), 3).unflatten(0, (-1, self.pairs)).transpose(1, 2)
        x = self.dropout(F.relu(self.norm1(x)))
        x = self.conv2(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, self.pairs)).transpose(1, 2)
        x = F.relu(self.attention(self.norm2(x)))
        return F.max_pool3d(x, (_TIME_POOL, 2, 2), (_TIME_STRIDE, 2, 2))
