"""Encodes a clip as texture cells and a summary vector: learnable Eulerian dynamics, optical flow, shallow CNNs.

The network on Eulerian dynamics follows what is known of AU-LLM's (filters, kernels, pooling, channel attention). Its
BatchNorm is a GroupNorm here (ours): statistics of one clip depend neither on the micro-batch nor on the number of
processes.

Shape letters: V clips, T frames, H W pixels, N cells, C channels, A action units.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aullm_dist.data.views import Visual, view_channels
from aullm_dist.errors import UserError
from aullm_dist.model.flow_cells import FlowCells

_GROUPS = 8
_FIRST_CHANNELS = 32
_CELL_CHANNELS = 64
_FIRST_KERNEL = (1, 5, 5)
_SECOND_KERNEL = (2, 3, 3)
_FIRST_POOL = (1, 3, 3)
_SECOND_POOL = (2, 2, 2)


def _logit(p: float) -> float:
    return math.log(p / (1.0 - p))


class Led(nn.Module):
    """Learnable Eulerian dynamics: the difference of two first-order low-pass filters over time, pixel by pixel.

    `W[i, j] = a [(1 - r1)^(j-i) r1^b - (1 - r2)^(j-i) r2^b]` with `b = min(1, i)` for j > i, `W[i, i] = a (r1 - r2)`,
    and 0 for j < i. The map of frame t is `sum_i W[i, t] I_i / (sum_i |W[i, t]| I_i + eps)`; frame 0, which has no
    past, is dropped.

    Two things are ours. The rates stay in (0, 1) through a sigmoid. And since each column of W but the first sums to
    0, `I_0` is subtracted from every frame in the numerator: the same value, but a constant clip gives exactly 0, and
    small movements keep their digits. The normalisation cancels `a` up to `eps`, so `a` sets little more than the
    noise floor in the dark.

    Source: field knowledge of LED (closed form of Eulerian magnification's band-pass); `eps` = 1/255 is one gray level.

    Args:
        num_frames: Frames T of a clip, 2 or more.
        eps: Added to the normaliser, in units of the input.
    """

    lag: Tensor

    def __init__(self, num_frames: int = 6, *, eps: float = 1.0 / 255.0) -> None:
        """Start from alpha 10, r1 0.4, r2 0.05."""
        super().__init__()
        self.num_frames = num_frames
        self.eps = eps
        # Of shape [1]: some optimizers and file formats have no place for a tensor without dimensions.
        self.log_alpha = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.logit_r1 = nn.Parameter(torch.tensor([_logit(0.4)]))
        self.logit_r2 = nn.Parameter(torch.tensor([_logit(0.05)]))
        frame = torch.arange(num_frames)
        self.register_buffer("lag", frame[None, :] - frame[:, None], persistent=False)

    def _low_pass(self, rate: Tensor) -> Tensor:
        weights = (1.0 - rate) ** self.lag.clamp(min=0)
        weights = torch.cat([weights[:1], weights[1:] * rate])
        return weights.triu()

    def weights(self) -> Tensor:
        """Return W `[T, T]`; column t holds the weights of the frames in map t."""
        r1, r2 = torch.sigmoid(self.logit_r1), torch.sigmoid(self.logit_r2)
        band = self._low_pass(r1) - self._low_pass(r2)
        corner = torch.zeros_like(band)
        corner[0, 0] = (r1 - r2).squeeze()
        return torch.exp(self.log_alpha) * (band + corner)

    def forward(self, clips: Tensor) -> Tensor:
        """Return the dynamics maps.

        Args:
            clips: Gray levels in 0..1, `[V, T, H, W]`.

        Returns:
            Relative temporal changes within -1..1, `[V, T-1, H, W]`.
        """
        # Movements are a few gray levels: low precision would round them away.
        with torch.autocast(clips.device.type, enabled=False):
            dtype = self.log_alpha.dtype
            pixels = clips.to(dtype).flatten(2)
            columns = self.weights()[:, 1:].t()
            change = columns @ (pixels - pixels[:, :1])
            level = columns.abs() @ pixels
            return (change / (level + self.eps)).unflatten(2, clips.shape[2:])


class ChannelAttention(nn.Module):
    """Squeeze and excitation: scale each channel by a gate computed from the means of all channels."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        """Build the two linear layers of the gate."""
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // reduction)
        self.excite = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` `[V, C, T, H, W]` per channel."""
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean(dim=(2, 3, 4))))))
        return x * gate[:, :, None, None, None]


def cell_grid_of(num_frames: int, image_size: int) -> tuple[int, int, int]:
    """Return the grid (time, rows, columns) of texture cells for clips of this size; (2, 9, 9) for 6 frames of 64
    pixels.

    Raises:
        UserError: The clip is too small for the network.
    """
    grid = [num_frames - 1, image_size, image_size]
    for kernel, pool in ((_FIRST_KERNEL, _FIRST_POOL), (_SECOND_KERNEL, _SECOND_POOL)):
        grid = [(size - k + 1) // p for size, k, p in zip(grid, kernel, pool, strict=True)]
    if min(grid) < 1:
        raise UserError(
            f"clips of {num_frames} frames of {image_size} pixels are too small for the visual backbone; "
            "allowed are 4 frames of 16 pixels and up"
        )
    return grid[0], grid[1], grid[2]


def conv_and_pool(maps: Tensor, weight: Tensor) -> Tensor:
    """Convolve each map with `weight` and take the maximum over windows as wide as their stride.

    Equal to `max_pool3d(conv3d(maps[:, None], weight), (1, p, p))`, but as one matrix product: the p * p positions of
    a pooling window read one patch of the image, with the kernel shifted inside it. With a single input channel
    the plain convolution is slow on a CPU: this way the whole backbone trains about 1.7 times as fast there.

    Args:
        maps: `[V, T, H, W]`.
        weight: `[C, 1, 1, k, k]`.

    Returns:
        `[V, C, T, (H-k+1) // p, (W-k+1) // p]`.
    """
    channels, kernel, pool = weight.shape[0], weight.shape[-1], _FIRST_POOL[-1]
    patch = kernel + pool - 1
    rest = range(pool)
    shifted = [F.pad(weight[:, 0, 0], (j, pool - 1 - j, i, pool - 1 - i)) for i in rest for j in rest]
    patches = maps.unfold(2, patch, pool).unfold(3, patch, pool)
    grid = patches.shape[:4]
    responses = F.linear(patches.reshape(-1, patch * patch), torch.stack(shifted).flatten(0, 1).flatten(1))
    # The maximum over positions is a 2-d pooling with the channels last in memory: [V*T, C, cells, positions].
    responses = responses.view(grid[0] * grid[1], -1, pool * pool, channels).permute(0, 3, 1, 2)
    return F.max_pool2d(responses, (1, pool * pool)).reshape(grid[0], grid[1], channels, *grid[2:]).transpose(1, 2)


class VisualBackbone(nn.Module):
    """Texture cells `[V, N, 64]` and a summary vector `[V, feature_dim]` of LED, of optical flow, or of both.

    LED maps go through a shallow 3D-CNN, flow maps through a 2D-CNN (`FlowCells`); of both, the cells of each place are
    mixed by one matrix. Shapes do not depend on the stream. Cells lie in the order time, rows, columns of `cell_grid`.

    LED maps are relative changes of a few percent; a fixed gain (ours) brings them to the order of 1, and the
    GroupNorms have an epsilon that is felt at the size of sensor noise, so that a clip without movement is not blown up
    to the size of one with movement.

    Args:
        num_frames: Frames T of a clip.
        image_size: Side of a frame in pixels.
        feature_dim: Width of the summary vector.
        dropout: Dropout after the first block and before the summary.
        visual: What the views hold (`data.views`): `led`, `flow` or `both`.

    Raises:
        UserError: The clip is too small for the network.
    """

    LED_GAIN = 20.0
    NORM_EPS = 0.1
    cell_dim = _CELL_CHANNELS

    def __init__(
        self,
        num_frames: int = 6,
        image_size: int = 64,
        feature_dim: int = 256,
        *,
        dropout: float = 0.1,
        visual: Visual = "led",
    ) -> None:
        """Build the network for one clip size."""
        super().__init__()
        self.cell_grid = cell_grid_of(num_frames, image_size)
        self.feature_dim = feature_dim
        self.num_cells = math.prod(self.cell_grid)
        self.stream = visual
        self.num_frames = num_frames
        self.input_shape = (view_channels(visual, num_frames), image_size, image_size)
        if visual != "flow":
            self.led = Led(num_frames)
            # No biases: a clip without movement then stays at 0 up to the norms.
            self.conv1 = nn.Conv3d(1, _FIRST_CHANNELS, _FIRST_KERNEL, bias=False)
            self.norm1 = nn.GroupNorm(_GROUPS, _FIRST_CHANNELS, eps=self.NORM_EPS)
            self.conv2 = nn.Conv3d(_FIRST_CHANNELS, _CELL_CHANNELS, _SECOND_KERNEL, bias=False)
            self.norm2 = nn.GroupNorm(_GROUPS, _CELL_CHANNELS, eps=self.NORM_EPS)
            self.attention = ChannelAttention(_CELL_CHANNELS)
        self.dropout = nn.Dropout(dropout)
        self.summary = nn.Linear(self.num_cells * _CELL_CHANNELS, feature_dim)
        self.summary_norm = nn.LayerNorm(feature_dim)
        if visual != "flow":
            for conv in (self.conv1, self.conv2):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        if visual != "led":
            self.flow = FlowCells(num_frames, image_size, ChannelAttention(_CELL_CHANNELS), dropout=dropout)
        if visual == "both":
            self.mix = nn.Linear(2 * _CELL_CHANNELS, _CELL_CHANNELS, bias=False)

    def forward(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Return the texture cells and the summary vector.

        Args:
            views: What `data.views.view_of` makes of clips, `[V, C, H, W]`: of `led` gray levels in 0..1,
                `[V, T, H, W]`.

        Returns:
            Cells `[V, N, C]` and summary `[V, feature_dim]`.

        Raises:
            ValueError: The views have another size than the network was built for.
        """
        if views.ndim != 4 or tuple(views.shape[1:]) != self.input_shape:
            raise ValueError(f"views is {list(views.shape)}, allowed is [V, {', '.join(map(str, self.input_shape))}]")
        parts = []
        if self.stream != "flow":
            parts.append(self._led_cells(views[:, : self.num_frames]))
        if self.stream != "led":
            parts.append(self.flow(views if self.stream == "flow" else views[:, self.num_frames :]))
        cells = torch.cat(parts, dim=1).flatten(2).transpose(1, 2)
        if self.stream == "both":
            cells = self.mix(cells)
        summary = self.summary_norm(self.summary(self.dropout(cells.flatten(1))))
        return cells, summary

    def _led_cells(self, clips: Tensor) -> Tensor:
        """Return cells `[V, C, time, rows, columns]` of gray clips `[V, T, H, W]`."""
        x = self.norm1(conv_and_pool(self.LED_GAIN * self.led(clips), self.conv1.weight))
        x = self.dropout(F.relu(x))
        x = F.relu(self.attention(self.norm2(self.conv2(x))))
        return F.max_pool3d(x, _SECOND_POOL)


class LedCnn(nn.Module):
    """The baseline without an LLM (`led_cnn`): the visual backbone and a linear head over the AUs.

    Args:
        num_aus: Number of AUs.
        num_frames: Frames T of a clip.
        image_size: Side of a frame in pixels.
        feature_dim: Width of the summary vector.
        dropout: Dropout of the backbone and before the head.
        visual: What the views hold.
    """

    def __init__(
        self,
        num_aus: int,
        num_frames: int = 6,
        image_size: int = 64,
        feature_dim: int = 256,
        *,
        dropout: float = 0.1,
        visual: Visual = "led",
    ) -> None:
        """Build backbone and head."""
        super().__init__()
        self.visual = VisualBackbone(num_frames, image_size, feature_dim, dropout=dropout, visual=visual)
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout(dropout), nn.Linear(feature_dim, num_aus))

    @property
    def stream(self) -> Visual:
        """What the views hold."""
        return self.visual.stream

    def summary(self, views: Tensor) -> Tensor:
        """Return the summary vector `[V, feature_dim]`, which the head reads."""
        return self.visual(views)[1]

    def forward(self, views: Tensor) -> Tensor:
        """Return the AU logits `[V, A]` of views `[V, C, H, W]`."""
        return self.head(self.summary(views))
