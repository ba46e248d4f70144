"""Implements networks without an LLM, each an arm of its own: what a full model has to beat.

`led_cnn` lies with the visual backbone. `led_sssnet` and `sssnet_of` follow what is known of the seed paper's baseline
and of its form on optical flow (layers, sizes, order), written from that alone. They keep its BatchNorm, since a
baseline must not be made weaker, although their answers then depend on the micro-batch and the number of processes.

Shape letters: V clips, T frames, H W pixels, A action units, J join width.
"""

import torch
from torch import Tensor, nn

from aullm_dist.data.views import Stream
from aullm_dist.model.projector import EvidenceJoin
from aullm_dist.model.visual import Led, VisualBackbone

_DROPOUT = 0.5
_HIDDEN = 256


def _head(features: int, num_aus: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(features, _HIDDEN), nn.ReLU(), nn.Dropout(_DROPOUT), nn.Linear(_HIDDEN, num_aus)
    )  # fmt: skip


class EvidenceBaseline(nn.Module):
    """`evidence`: visual backbone, MGE-EFP's join and a linear head; no graph and no LLM.

    Args:
        visual: the visual backbone.
        join: MGE-EFP's join of the backbone's cells and summary.
        num_aus: A.
    """

    def __init__(self, visual: VisualBackbone, join: EvidenceJoin, num_aus: int) -> None:
        super().__init__()
        self.visual, self.join, self.num_aus = visual, join, num_aus
        self.head = nn.Linear(join.join_dim, num_aus)

    @property
    def stream(self) -> Stream:
        """What the views hold."""
        return self.visual.stream

    def summary(self, views: Tensor) -> Tensor:
        """Return the join `[V, J]`, which the head reads."""
        return self.join(*self.visual(views))

    def forward(self, views: Tensor) -> Tensor:
        """Return the AU logits `[V, A]` of views `[V, C, H, W]`."""
        joined = self.summary(views)
        # Logits of a few units lose too much in bfloat16.
        with torch.autocast(joined.device.type, enabled=False):
            return self.head(joined.to(self.head.weight.dtype))


class LedSssNet(nn.Module):
    """`led_sssnet`: learnable Eulerian dynamics and a three-dimensional shallow network.

    conv 1 -> 32 (1, 5, 5), ReLU, pool (1, 3, 3), BatchNorm, dropout; conv 32 -> 64 (2, 3, 3), ReLU, pool 2, BatchNorm,
    dropout; 256 units, ReLU, dropout; A logits. All dropout is 0.5. 2.69 million parameters at 6 frames of 64 pixels.

    Args:
        num_aus: A.
        num_frames: T.
        image_size: side of a frame in pixels.

    Source: field knowledge of the seed paper's baseline.
    """

    stream: Stream = "led"

    def __init__(self, num_aus: int, num_frames: int = 6, image_size: int = 64) -> None:
        super().__init__()
        self.led = Led(num_frames)
        self.blocks = nn.Sequential(
            nn.Conv3d(1, 32, (1, 5, 5)), nn.ReLU(), nn.MaxPool3d((1, 3, 3)), nn.BatchNorm3d(32), nn.Dropout3d(_DROPOUT),
            nn.Conv3d(32, 64, (2, 3, 3)), nn.ReLU(), nn.MaxPool3d(2), nn.BatchNorm3d(64), nn.Dropout3d(_DROPOUT),
        )  # fmt: skip
        side = ((image_size - 4) // 3 - 2) // 2
        self.head = _head(64 * ((num_frames - 2) // 2) * side * side, num_aus)

    def summary(self, views: Tensor) -> Tensor:
        """Return what the head reads, `[V, F]`."""
        return self.blocks(self.led(views).unsqueeze(1)).flatten(1)

    def forward(self, views: Tensor) -> Tensor:
        """Return the AU logits `[V, A]` of gray clips `[V, T, H, W]` in 0..1."""
        return self.head(self.summary(views))


class SssNetOf(nn.Module):
    """`sssnet_of`: the two-dimensional form of the same network on the flow from onset to apex.

    conv 3 -> 32 (5, 5), ReLU, pool 3, BatchNorm, dropout; conv 32 -> 64 (3, 3), ReLU, pool 2, BatchNorm, dropout; 256
    units, ReLU, dropout; A logits. 1.35 million parameters. Its views are `data.views.onset_apex_image`.

    Args:
        num_aus: A.

    Source: field knowledge of SSSNet on optical flow.
    """

    stream: Stream = "onset_apex"

    def __init__(self, num_aus: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            nn.Conv2d(3, 32, 5), nn.ReLU(), nn.MaxPool2d(3), nn.BatchNorm2d(32), nn.Dropout2d(_DROPOUT),
            nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.Dropout2d(_DROPOUT),
        )  # fmt: skip
        self.head = _head(64 * 9 * 9, num_aus)

    def summary(self, views: Tensor) -> Tensor:
        """Return what the head reads, `[V, F]`."""
        return self.blocks(views).flatten(1)

    def forward(self, views: Tensor) -> Tensor:
        """Return the AU logits `[V, A]` of images `[V, 3, 64, 64]` in 0..1."""
        return self.head(self.summary(views))
