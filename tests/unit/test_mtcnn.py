"""The crop `mtcnn`: drawn faces are found and turned level, and numpy's layers are torch's."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from aullm_dist.data.crops import NoRegion, detector, get_crop
from aullm_dist.data.crops.detector import find_faces
from aullm_dist.data.frames import Cutter
from aullm_dist.data.synthetic import SyntheticSpec, write_corpus

GRAY = (128, 128, 128)


@pytest.fixture(scope="module")
def face(tmp_path_factory) -> Image.Image:
    """A drawn face, upright."""
    root = tmp_path_factory.mktemp("drawn") / "casme2"
    write_corpus(SyntheticSpec(corpus="casme2", subjects=1, clips_per_subject=1), root)
    return Image.open(min(root.rglob("*.jpg"))).convert("RGB")


def on_a_wall(*faces: tuple[Image.Image, int, int], size: tuple[int, int] = (320, 240)) -> Image.Image:
    wall = Image.new("RGB", size, GRAY)
    for picture, left, top in faces:
        wall.paste(picture, (left, top))
    return wall


def test_a_tilted_face_comes_out_level(face):
    upright = get_crop("mtcnn").fit(face, "clip")
    assert abs(upright.angle) < 6
    for degrees in (-14, 14):
        turned = face.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=GRAY)
        region = get_crop("mtcnn").fit(turned, "clip")
        assert region.angle - upright.angle == pytest.approx(-degrees, abs=5)
        found = Cutter(64, get_crop("mtcnn"), "clip").cut_image(turned, "frame 0")
        expected = Cutter(64, get_crop("mtcnn"), "clip").cut_image(face, "frame 0")
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.8


def test_the_square_holds_the_face_wherever_it_is(face):
    width, height = face.size
    alone = get_crop("mtcnn").fit(face, "clip")
    region = get_crop("mtcnn").fit(on_a_wall((face, 150, 70)), "clip")
    found = np.array(
        [region.left * 320 - 150, region.top * 240 - 70, region.right * 320 - 150, region.bottom * 240 - 70]
    )
    expected = np.array([alone.left * width, alone.top * height, alone.right * width, alone.bottom * height])
    assert np.abs(found - expected).max() < 6
    assert (region.right - region.left) * 320 == pytest.approx((region.bottom - region.top) * 240)


def test_of_several_faces_the_largest_is_taken(face):
    large, small = face.resize((112, 136)), face.resize((74, 90))
    for left, other in ((10, 200), (190, 20)):
        picture = on_a_wall((large, left, 50), (small, other, 60))
        assert len(find_faces(np.asarray(picture), 30)) == 2
        region = get_crop("mtcnn").fit(picture, "clip")
        assert left < (region.left + region.right) / 2 * 320 < left + 112


def test_gray_frames_are_taken_and_faceless_ones_refused(face):
    assert get_crop("mtcnn").fit(face.convert("L"), "clip").right > 0.5
    noise = np.random.default_rng(0).integers(0, 256, (120, 160), dtype=np.uint8)
    for picture in (Image.new("L", (160, 120), 90), Image.fromarray(noise), Image.new("RGB", (9, 9))):
        with pytest.raises(NoRegion, match="no face found in the onset frame"):
            get_crop("mtcnn").fit(picture, "clip")


def test_it_is_a_crop_of_its_own_name():
    crop = get_crop("mtcnn")
    assert (crop.identity, crop.fingerprint) == ("mtcnn", "mtcnn")


def _torch_layer(x: torch.Tensor, network: str, layer: int) -> torch.Tensor:
    weights = {name: torch.from_numpy(value) for name, value in detector._weights().items()}
    y = F.conv2d(x, weights[f"{network}.conv{layer}.weight"], weights[f"{network}.conv{layer}.bias"])
    return F.prelu(y, weights[f"{network}.prelu{layer}.weight"])


@pytest.mark.parametrize(("network", "size", "pools"), [("rnet", 24, (3, 3, 0)), ("onet", 48, (3, 3, 2))])
def test_the_layers_are_torchs(network, size, pools):
    x = np.random.default_rng(0).normal(size=(3, 3, size, size)).astype(np.float32)
    mine, theirs = x, torch.from_numpy(x)
    for layer, pool in enumerate(pools, start=1):
        mine, theirs = detector._conv(mine, network, layer), _torch_layer(theirs, network, layer)
        if pool:
            mine, theirs = detector._pooled(mine, pool), F.max_pool2d(theirs, pool, 2, ceil_mode=True)
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs.numpy()).max() < 1e-4


@pytest.mark.parametrize("size", [(12, 12), (30, 17), (61, 80)])
def test_a_picture_is_resized_by_areas(size):
    x = np.random.default_rng(1).uniform(0, 255, (3, 60, 81)).astype(np.float32)
    expected = F.interpolate(torch.from_numpy(x)[None], size=size, mode="area")[0].numpy()
    assert np.abs(detector._resized(x, *size) - expected).max() < 1e-3


def test_a_covered_box_goes_and_the_surest_stays():
    boxes = np.array([[0, 0, 10, 10, 0.8], [1, 1, 11, 11, 0.9], [30, 30, 40, 40, 0.7], [31, 31, 35, 35, 0.6]])
    assert detector._kept(boxes, 0.5).tolist() == [1, 2, 3]
    # The smallest lies within another: of its own area nearly all is covered.
    assert detector._kept(boxes, 0.5, of_smaller=True).tolist() == [1, 2]
    assert detector._kept(np.empty((0, 5)), 0.5).tolist() == []
