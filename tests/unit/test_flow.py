"""Optical flow of clips: known displacements, strain of known fields, and what changes of the frames make of it."""

import cv2
import numpy as np
import pytest

from aullm_dist.data.flow import RAW_FLOW, FlowSettings, clip_flow, strain_of
from aullm_dist.data.views import view_channels, view_of

SIDE = 64
INSIDE = slice(8, -8)


def _texture(seed=0):
    noise = np.random.default_rng(seed).random((2 * SIDE, 2 * SIDE)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.0)
    return (smooth - smooth.min()) / (smooth.max() - smooth.min())


def _moved(x, y, seed=0):
    """The middle of a texture, moved by (x, y) pixels to the right and down."""
    matrix = np.float32([[1, 0, x], [0, 1, y]])
    moved = cv2.warpAffine(_texture(seed), matrix, (2 * SIDE, 2 * SIDE), flags=cv2.INTER_CUBIC)
    return np.clip(moved[SIDE // 2 : 3 * SIDE // 2, SIDE // 2 : 3 * SIDE // 2], 0, 1)


@pytest.mark.parametrize(
    "settings", [FlowSettings(), RAW_FLOW, FlowSettings(upsample=1, lighting=0), FlowSettings(method="dis", lighting=0)]
)
def test_a_translation_is_found_and_has_no_strain(settings):
    moves = [(0.0, 0.0), (0.25, 0.0), (0.0, -0.5), (1.0, 0.75)]
    maps = clip_flow(np.stack([_moved(*move) for move in moves]), settings)
    assert maps.shape == (3, 2, SIDE, SIDE)
    assert maps.dtype == np.float32
    for flow, move in zip(maps, moves[1:], strict=True):
        np.testing.assert_allclose(flow[:, INSIDE, INSIDE].mean(axis=(1, 2)), move, atol=0.06)
        assert strain_of(*flow)[INSIDE, INSIDE].mean() < 0.03


def test_equal_frames_have_not_moved():
    frames = np.repeat(_moved(0, 0)[None], 4, axis=0)
    assert not clip_flow(frames).any()
    noisy = frames.copy()
    noisy[2] += 0.01 * np.random.default_rng(0).normal(size=(SIDE, SIDE)).astype(np.float32)
    assert [bool(flow.any()) for flow in clip_flow(noisy)] == [False, True, False]


def test_bytes_and_floats_give_the_same_flow():
    frames = (np.stack([_moved(0, 0), _moved(0.5, 0.25)]) * 255).round().astype(np.uint8)
    np.testing.assert_allclose(clip_flow(frames), clip_flow(frames.astype(np.float32) / 255), atol=2e-4)


def test_strain_of_linear_fields_is_the_norm_of_their_symmetric_part():
    y, x = np.mgrid[0:9, 0:7].astype(float)
    for gradient in ([[0.1, 0.0], [0.0, 0.0]], [[0.02, 0.05], [0.03, -0.04]], [[0.0, 0.1], [-0.1, 0.0]]):
        gradient = np.array(gradient)
        u, v = gradient[0, 0] * x + gradient[0, 1] * y, gradient[1, 0] * x + gradient[1, 1] * y
        expected = np.linalg.norm((gradient + gradient.T) / 2)
        np.testing.assert_allclose(strain_of(u, v), expected, atol=1e-12)


def test_a_mirror_turns_the_horizontal_displacement():
    frames = np.stack([_moved(0, 0), _moved(0.5, 0.25), _moved(-0.75, 0.5)])
    plain, mirrored = clip_flow(frames), clip_flow(np.ascontiguousarray(frames[:, :, ::-1]))[..., ::-1]
    for channel, sign in enumerate((-1, 1)):
        np.testing.assert_allclose(
            mirrored[:, channel, INSIDE, INSIDE], sign * plain[:, channel, INSIDE, INSIDE], atol=0.02
        )


def test_changing_light_is_not_taken_for_movement():
    """A gain that drifts and a shadow that comes: what moved by half a pixel did so in any light."""
    still, moved = _moved(0, 0), _moved(0.5, 0)
    shadow = 1 - 0.25 * np.exp(-((np.arange(SIDE)[:, None] - 20) ** 2 + (np.arange(SIDE)[None] - 40) ** 2) / 400)
    lit, dim = np.stack([still, moved]), np.stack([still, moved * 0.9 * shadow.astype(np.float32)])

    def change(settings):
        return np.abs(clip_flow(dim, settings) - clip_flow(lit, settings))[..., INSIDE, INSIDE].mean()

    assert change(FlowSettings()) < 0.5 * change(RAW_FLOW)


def test_head_motion_can_be_removed():
    still, moved = _moved(0, 0), _moved(0.75, 0.5)
    local = moved.copy()
    local[20:32, 20:32] = _moved(0.75, 1.5)[20:32, 20:32]
    for stabilise in ("median", "affine"):
        flow = clip_flow(np.stack([still, local]), FlowSettings(stabilise=stabilise))[0]
        assert np.abs(np.median(flow[:, 40:56, 40:56], axis=(1, 2))).max() < 0.1
        assert flow[1, 24:28, 24:28].mean() > 0.3, "what moves against the head stays"


def test_a_clip_is_looked_at_alone_and_the_threads_of_others_are_left():
    frames = np.stack([_moved(0, 0), _moved(0.5, 0.25)])
    before = cv2.getNumThreads()
    first = clip_flow(frames)
    clip_flow(np.stack([_moved(0, 0, 1), _moved(3, 3, 1)]))
    np.testing.assert_array_equal(clip_flow(frames), first)
    assert cv2.getNumThreads() == before


def test_views_hold_what_their_stream_asks_for():
    frames = np.stack([_moved(0.1 * t, 0) for t in range(4)])
    flow = view_of(frames, "flow")
    for visual in ("led", "flow", "both"):
        view = view_of(frames, visual)
        assert view.shape == (view_channels(visual, 4), SIDE, SIDE)
        assert view.dtype == np.float32
    np.testing.assert_array_equal(flow, clip_flow(frames).reshape(6, SIDE, SIDE))
    np.testing.assert_array_equal(view_of(frames, "both"), np.concatenate([frames, flow]))
