"""LED, the 3D-CNN and the baseline without an LLM."""

import pytest
import torch
import torch.nn.functional as F

from aullm_dist.data.views import view_channels
from aullm_dist.errors import UserError
from aullm_dist.model.visual import Led, LedCnn, VisualBackbone, cell_grid_of, conv_and_pool


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def published_weights(num_frames, alpha, r1, r2):
    """The published formula, entry by entry."""
    weights = torch.zeros(num_frames, num_frames, dtype=torch.float64)
    for i in range(num_frames):
        weights[i, i] = alpha * (r1 - r2)
        for j in range(i + 1, num_frames):
            b = min(1, i)
            weights[i, j] = alpha * ((1 - r1) ** (j - i) * r1**b - (1 - r2) ** (j - i) * r2**b)
    return weights


@pytest.mark.parametrize("num_frames", [2, 6, 9])
def test_led_weights_are_the_published_ones(num_frames):
    torch.testing.assert_close(Led(num_frames).double().weights(), published_weights(num_frames, 10.0, 0.4, 0.05))


def test_led_maps_are_the_published_ones():
    clips = torch.rand(2, 6, 4, 5, dtype=torch.float64)
    weights = published_weights(6, 10.0, 0.4, 0.05)
    change = torch.einsum("it,vihw->vthw", weights, clips)
    level = torch.einsum("it,vihw->vthw", weights.abs(), clips)
    led = Led().double()
    torch.testing.assert_close(led(clips), (change / (level + led.eps))[:, 1:])


def test_led_of_a_constant_clip_is_exactly_zero():
    clips = torch.rand(3, 1, 8, 8).expand(-1, 6, -1, -1)
    assert (Led()(clips) == 0).all()
    black = Led()(torch.zeros(1, 6, 8, 8))
    assert (black == 0).all()


def test_led_sees_movement_and_is_nearly_blind_to_gain():
    clips = 0.4 + 0.1 * torch.rand(2, 6, 8, 8)
    maps = Led()(clips)
    assert maps.abs().max() <= 1
    assert maps.abs().mean() > 1e-3
    torch.testing.assert_close(Led()(1.5 * clips), maps, rtol=0.02, atol=1e-4)


def test_led_rates_stay_between_0_and_1_and_learn():
    led = Led()
    optimizer = torch.optim.SGD(led.parameters(), lr=100.0)
    led(torch.rand(2, 6, 8, 8)).square().mean().neg().backward()
    assert all(p.grad.abs().item() > 0 for p in led.parameters())
    optimizer.step()
    with torch.no_grad():
        led.logit_r1 += 50.0
    assert torch.isfinite(led.weights()).all()
    assert torch.isfinite(led(torch.rand(2, 6, 8, 8))).all()


def test_led_keeps_full_precision_under_autocast():
    clips = torch.rand(1, 6, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = Led()(clips)
    assert torch.equal(inside, Led()(clips))


@pytest.mark.parametrize(
    ("num_frames", "image_size", "grid"), [(6, 64, (2, 9, 9)), (4, 16, (1, 1, 1)), (8, 112, (3, 17, 17))]
)
def test_the_cell_grid_follows_from_the_clip(num_frames, image_size, grid):
    assert cell_grid_of(num_frames, image_size) == grid
    for stream in ("led", "flow", "both"):
        visual = VisualBackbone(num_frames, image_size, feature_dim=16, visual=stream).eval()
        cells, high = visual(torch.rand(2, *visual.input_shape))
        assert visual.input_shape[0] == view_channels(stream, num_frames)
        assert cells.shape == (2, visual.num_cells, visual.cell_dim)
        assert high.shape == (2, 16)
        assert visual.cell_grid == grid


@pytest.mark.parametrize(("height", "width"), [(64, 64), (16, 23)])
def test_the_first_block_is_a_convolution_and_a_pooling(height, width):
    maps = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    expected = F.max_pool3d(F.conv3d(maps[:, None], weight), (1, 3, 3))
    found = conv_and_pool(maps, weight)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (maps, weight), upstream),
        torch.autograd.grad(expected, (maps, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_cells_lie_in_the_order_of_the_grid():
    visual = VisualBackbone(feature_dim=16).eval()
    still = torch.full((1, 6, 64, 64), 0.5)
    moving = still.clone()
    moving[:, 3, 56:, :8] = 0.6
    with torch.no_grad():
        difference = (visual(moving)[0] - visual(still)[0]).abs().sum(-1).unflatten(1, visual.cell_grid)
    # The channel attention scales all cells, but only those near the movement change by their own input.
    assert difference.sum((0, 1)).argmax().item() == 8 * 9
    assert difference.sum((0, 1))[0].max() < difference.sum((0, 1))[8, 0]


@pytest.mark.parametrize("stream", ["led", "flow", "both"])
def test_a_clip_is_computed_alone(stream):
    visual = VisualBackbone(feature_dim=16, visual=stream).eval()
    clips = torch.rand(3, *visual.input_shape)
    with torch.no_grad():
        together, alone = visual(clips), visual(clips[1:2])
    for whole, part in zip(together, alone, strict=True):
        torch.testing.assert_close(whole[1:2], part, rtol=1e-4, atol=1e-5)


def test_all_still_clips_look_alike_whatever_face_they_show():
    visual = VisualBackbone(feature_dim=16).eval()
    with torch.no_grad():
        cells, high = visual(torch.rand(2, 1, 64, 64).expand(-1, 6, -1, -1))
    assert torch.equal(cells[0], cells[1])
    assert torch.isfinite(high).all()


@pytest.mark.parametrize("stream", ["led", "flow", "both"])
def test_every_parameter_of_the_baseline_learns(stream):
    network = LedCnn(3, visual=stream)
    logits = network(torch.rand(2, *network.visual.input_shape))
    assert logits.shape == (2, 3)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.ones(2, 3)).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    parts = {name.split(".")[0] for name, _ in network.visual.named_parameters()}
    assert ("led" in parts, "flow" in parts) == (stream != "flow", stream != "led")


def test_flow_cells_lie_where_the_movement_is():
    visual = VisualBackbone(feature_dim=16, visual="flow").eval()
    still = torch.zeros(1, 5, 2, 64, 64)
    moving = still.clone()
    moving[:, 2, 0, 56:, :8] = 0.3
    with torch.no_grad():
        cells = [visual(maps.flatten(1, 2))[0] for maps in (moving, still)]
    difference = (cells[0] - cells[1]).abs().sum(-1).unflatten(1, visual.cell_grid)
    # Below: the only frame with movement lies in both windows over time.
    assert (difference[0, :, 8, 0] > 0).all()
    assert difference.sum((0, 1)).argmax().item() == 8 * 9


def test_displacements_count_as_shares_of_the_face():
    """A face of twice the pixels moves by twice the pixels: the network is given the same numbers."""
    small, large = (VisualBackbone(6, side, feature_dim=16, visual="flow").flow.gain for side in (64, 128))
    assert 2 * large == small


def test_wrong_clips_are_refused():
    with pytest.raises(UserError, match=r"3 frames of 64 pixels are too small .* allowed are 4 frames of 16 pixels"):
        VisualBackbone(3, 64)
    with pytest.raises(UserError, match="6 frames of 15 pixels"):
        VisualBackbone(6, 15)
    with pytest.raises(ValueError, match=r"views is \[2, 5, 64, 64\], allowed is \[V, 6, 64, 64\]"):
        VisualBackbone()(torch.rand(2, 5, 64, 64))


def test_shapes_of_the_visual_stream():
    """Checkpoints and releases hold tensors of these shapes; a kernel of another width can leave the grid as it is."""
    shared = {
        "summary.weight": (256, 10368), "summary.bias": (256,),
        "summary_norm.weight": (256,), "summary_norm.bias": (256,),
    }  # fmt: skip
    attention = {
        "attention.squeeze.weight": (4, 64), "attention.squeeze.bias": (4,),
        "attention.excite.weight": (64, 4), "attention.excite.bias": (64,),
    }  # fmt: skip
    norms = {f"norm{i}.{kind}": (width,) for i, width in ((1, 32), (2, 64)) for kind in ("weight", "bias")}
    led = {"conv1.weight": (32, 1, 1, 5, 5), "conv2.weight": (64, 32, 2, 3, 3), **norms, **attention}
    led |= {f"led.{name}": (1,) for name in ("log_alpha", "logit_r1", "logit_r2")}
    flow = {"conv1.weight": (32, 2, 5, 5), "conv2.weight": (64, 32, 3, 3), **norms, **attention}
    flow = {f"flow.{name}": shape for name, shape in flow.items()}
    for visual, shapes in (("led", led), ("flow", flow), ("both", {**led, **flow, "mix.weight": (64, 128)})):
        model = VisualBackbone(6, 64, dropout=0.1, visual=visual)
        assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {**shared, **shapes}
        groups = {module.num_groups for module in model.modules() if isinstance(module, torch.nn.GroupNorm)}
        assert groups == {8}
