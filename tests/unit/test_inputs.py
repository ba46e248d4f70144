"""Clips to predict: prepared datasets and folders of frames together, in the order that was asked for."""

import numpy as np
import pytest
from PIL import Image

from aullm_dist.data.clips import ClipStore
from aullm_dist.data.inputs import InputClips
from aullm_dist.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Eight frames of 80 pixels, numbered from 5 on; each is of one gray value."""
    clip = tmp_path / "clip"
    clip.mkdir()
    for number in range(5, 13):
        Image.new("L", (80, 80), 10 * number).save(clip / f"img{number}.png")
    return str(clip)


def test_datasets_and_folders_stand_side_by_side(tiny_dataset, folder):
    both = InputClips([folder, str(tiny_dataset)], size=64, trained=[], crop="none")
    store = ClipStore([tiny_dataset], 64)
    names = [sample.sample_id for sample in store.samples]
    assert [sample.sample_id for sample in both.samples] == [*names, folder]
    assert len(both) == len(names) + 1
    assert both.crop == "none"
    assert both.labelled.tolist() == [True] * len(names) + [False]
    aus = sorted({au for sample in store.samples for au in sample.aus})
    labels = both.labels(aus)
    assert labels.dtype == np.float32
    assert labels[0].tolist() == [float(au in store.samples[0].aus) for au in aus]
    assert not labels[-1].any()
    stored = both.clip(2)
    assert stored.sample_id == names[2]
    np.testing.assert_array_equal(stored.frames, store.view(names).clip(2).frames)
    loose = both.clip(len(names))
    assert loose.frames[:, 0, 0].tolist() == [10 * number for number in range(5, 13)]
    assert both.clip(len(names)) is loose, "it is read once"
    numbers = stored.frame_numbers[[1, 4]].tolist()
    np.testing.assert_array_equal(both.pictures(2, numbers, 70), stored.frames[[1, 4]])
    larger = both.pictures(len(names), [6, 9], 70)
    assert larger.shape == (2, 70, 70)
    assert larger[:, 0, 0].tolist() == [60, 90]


def test_only_the_clips_that_are_named_and_in_that_order(tiny_dataset, folder):
    names = [sample.sample_id for sample in ClipStore([tiny_dataset], 64).samples]
    wanted = [folder, names[3], names[1]]
    some = InputClips([str(tiny_dataset), folder], size=64, trained=[], crop="none", only=wanted)
    assert [sample.sample_id for sample in some.samples] == wanted
    assert [some.clip(index).sample_id for index in (1, 2)] == [names[3], names[1]]
    with pytest.raises(UserError, match=f"--clip nobody: no such clip among the inputs; the first is {names[0]}"):
        InputClips([str(tiny_dataset)], size=64, trained=[], only=[names[0], "nobody"])


def test_what_cannot_be_together_is_refused(tiny_dataset, folder):
    dataset = str(tiny_dataset)
    assert InputClips([dataset], size=64, trained=[]).crop is None
    for inputs, options, message in (
        ([folder, folder], {}, f"{folder}: given twice; name each clip once"),
        ([""], {}, "an input is empty"),
        (["nowhere"], {}, "nowhere: does not exist"),
        ([dataset], {"crop": "none"}, "--crop none: prepared datasets are cut already"),
        ([dataset, folder], {"onset": 6}, "--onset and --offset belong to one folder"),
        ([dataset], {"offset": 6}, "--onset and --offset belong to one folder"),
    ):
        options = options if inputs == [dataset] else {"crop": "none", **options}
        with pytest.raises(UserError, match=message):
            InputClips(inputs, size=64, trained=[], **options)
    part = InputClips([folder], size=64, trained=[], crop="none", onset=6, offset=11).clip(0)
    assert part.frame_numbers.tolist() == list(range(6, 12))
