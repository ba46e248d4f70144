"""Parquet datasets: the same clips as in Arrow files, and streams that give every process its share once per epoch."""

import json
from collections import Counter

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from corpus_fixtures import casme2_row, make_casme2, make_samm
from torch.utils.data import DataLoader

from aullm_dist.data import tables
from aullm_dist.data.clips import ClipStore, read_samples
from aullm_dist.data.order import BatchPlan
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.errors import UserError
from aullm_dist.training.batches import ClipRecipe, collate
from aullm_dist.training.streaming import StreamedBatches, stream_epoch

NUM_CLIPS = 13


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One release prepared in both formats, the Parquet one over several files, and another corpus in Parquet."""
    root = tmp_path_factory.mktemp("parquet")
    rows = [casme2_row(clip // 5 + 1, f"EP{clip:02d}_01", 9, 10, 13, 4 + clip % 3) for clip in range(NUM_CLIPS)]
    release = make_casme2(root / "release", rows)
    before, tables.CLIPS_PER_FILE = tables.CLIPS_PER_FILE, 3
    try:
        for fmt in tables_formats():
            prepare("casme2", release, root / fmt, PrepareOptions(size=16, num_workers=1, fmt=fmt))
        prepare(
            "samm",
            make_samm(root / "samm_release"),
            root / "samm",
            PrepareOptions(size=16, num_workers=1, fmt="parquet"),
        )
    finally:
        tables.CLIPS_PER_FILE = before
    return root


def tables_formats():
    from aullm_dist.data.preparation.prepare import FORMATS

    return FORMATS


def test_parquet_holds_the_clips_of_the_arrow_files(folders):
    arrow, parquet = (ClipStore([folders / fmt], 16) for fmt in ("arrow", "parquet"))
    assert arrow.samples == parquet.samples
    names = [sample.sample_id for sample in arrow.samples][::-2]
    one, two = arrow.view(names), parquet.view(names)
    for index in range(len(names)):
        first, second = one.clip(index), two.clip(index)
        assert first.sample_id == second.sample_id == names[index]
        np.testing.assert_array_equal(first.frames, second.frames)
        np.testing.assert_array_equal(first.frame_numbers, second.frame_numbers)
    files = tables.parquet_files(folders / "parquet")
    assert [pq.read_metadata(file).num_rows for file in files] == [3, 3, 3, 3, 1]
    assert all(pq.read_metadata(file).num_row_groups == pq.read_metadata(file).num_rows for file in files)


def test_arrow_files_are_those_that_datasets_itself_writes(folders, tmp_path):
    ours = datasets.load_from_disk(str(folders / "arrow"))
    ours.save_to_disk(str(tmp_path / "theirs"))
    theirs = datasets.load_from_disk(str(tmp_path / "theirs"))
    assert ours.features == theirs.features
    assert ours[:] == theirs[:]
    states = [json.loads((folder / "state.json").read_text()) for folder in (folders / "arrow", tmp_path / "theirs")]
    assert [part.keys() for part in states][0] == states[1].keys()
    assert states[0]["_data_files"] == states[1]["_data_files"]


def test_formats_may_be_joined_and_a_view_reaches_its_own_clips_only(folders):
    store = ClipStore([folders / "arrow", folders / "samm"], 16)
    assert [sorted(part) for part in store.corpora] == [["casme2"], ["samm"]]
    names = [sample.sample_id for sample in store.samples]
    assert names == [sample.sample_id for sample in read_samples([folders / "arrow", folders / "samm"])]
    view = store.view([names[-1], names[0]])
    assert [view.clip(index).sample_id for index in range(2)] == [names[-1], names[0]]
    with pytest.raises(IndexError):
        view.clip(2)
    assert len(view._table) == 2


def test_damaged_parquet_and_arrow_without_parquet_are_refused(folders, tmp_path):
    (tmp_path / "clips-00000.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="damaged"):
        ClipStore([tmp_path], 16)
    store = ClipStore([folders / "arrow"], 16)
    with pytest.raises(UserError, match="--format parquet"):
        store.parquet_of([store.samples[0].sample_id])


def epoch_names(files, names, **options):
    settings = {"seed": 0, "epoch": 0, "buffer": 4, "processes": 1, "rank": 0, **options}
    return [row["sample_id"] for row in stream_epoch(files, frozenset(names), **settings)]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_training_clip_comes_once_per_epoch_and_no_other_ever(folders, processes):
    files = tables.parquet_files(folders / "parquet")
    names = [sample.sample_id for sample in read_samples([folders / "parquet"])][2:12]
    shares = [epoch_names(files, names, processes=processes, rank=rank) for rank in range(processes)]
    assert Counter(name for share in shares for name in share) == Counter(names)
    assert all(shares)
    if processes == 1:
        assert shares[0] == epoch_names(files, names)
        assert shares[0] != epoch_names(files, names, epoch=1)
        assert shares[0] != epoch_names(files, names, seed=1)
        assert shares[0] != sorted(names)


def batches(folders, steps, workers=0, rank=0):
    store = ClipStore([folders / "parquet"], 16)
    chosen = store.samples[:10]
    labels = {sample.sample_id: np.array([float(4 in sample.aus)], np.float32) for sample in chosen}
    plan = BatchPlan(global_batch=4, micro_batch=2, processes=1, rank=rank)
    files = store.parquet_of(list(labels))
    stream = StreamedBatches(files, labels, ClipRecipe(4, 0.2, True), plan, steps, seed=0, buffer=4)
    loader = DataLoader(stream, batch_size=None, collate_fn=collate, num_workers=workers)
    return [(batch.sample_ids, batch.labels.tolist(), batch.views.sum().item()) for batch in loader]


def test_a_resumed_stream_goes_on_where_it_was(folders):
    whole = batches(folders, (0, 5))
    assert len(whole) == 10
    assert batches(folders, (2, 5)) == whole[4:]
    # Ten clips make five micro-batches: the second epoch has the same clips in another order, cut and moved anew.
    first, second = whole[:5], whole[5:]
    assert sorted(n for ids, *_ in first for n in ids) == sorted(n for ids, *_ in second for n in ids)
    assert first != second


def test_a_loader_process_keeps_the_order(folders):
    assert batches(folders, (0, 3), workers=1) == batches(folders, (0, 3))


def test_a_process_without_clips_is_told(folders):
    store = ClipStore([folders / "parquet"], 16)
    name = store.samples[0].sample_id
    plan = BatchPlan(global_batch=2, micro_batch=1, processes=2, rank=1)
    stream = StreamedBatches(
        store.parquet_of([name]), {name: np.zeros(1, np.float32)}, ClipRecipe(4), plan, (0, 1), seed=0, buffer=4
    )
    with pytest.raises(UserError, match="leave none for process 1 of 2"):
        list(stream)
