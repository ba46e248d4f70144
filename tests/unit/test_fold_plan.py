"""The folds of a run from its settings and its clips."""

import pytest

from aullm_dist.config import load
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.corpora import CORPORA
from aullm_dist.data.fold_plan import fold_plan
from aullm_dist.data.protocols import FoldPlan, make_folds, write_folds
from aullm_dist.errors import UserError


def _plan(store, *settings):
    return fold_plan(load(None, ["data.train=data/tiny", *settings]), store, 1)


def test_settings_decide_the_folds(tiny_dataset, tmp_path):
    store = ClipStore([tiny_dataset], 64)
    plan = _plan(store, "data.protocol=loso", "data.inner_fraction=0.4", "training.seed=3")
    folds = make_folds(store.samples, "loso", seed=3, inner_fraction=0.4)
    assert plan == FoldPlan("loso", ("casme2",), CORPORA["casme2"].aus, 3, folds)
    grouped = _plan(store, "data.protocol=grouped", "data.folds=3", "data.aus=[4,12]")
    assert (grouped.aus, len(grouped.folds)) == ((4, 12), 3)
    path = tmp_path / "folds.json"
    write_folds(path, grouped)
    assert _plan(store, f"data.folds_file={path}") == grouped
    assert _plan(store, f"data.folds_file={path}", "data.aus=[1]").aus == (1,)
    with pytest.raises(UserError, match=r"data.aus names AU3; allowed: 1, 2, 4"):
        _plan(store, "data.aus=[4,3]")
