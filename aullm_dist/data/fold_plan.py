"""Makes the folds of a run from its settings and its clips."""

import dataclasses
from pathlib import Path

from aullm_dist.config import Config
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.protocols import FoldPlan, au_vocabulary, make_folds, plan_from_file
from aullm_dist.errors import UserError
from aullm_dist.facs import AU_NAMES


def fold_plan(config: Config, store: ClipStore, num_train_folders: int) -> FoldPlan:
    """Return the folds of a run.

    Args:
        config: its configuration.
        store: the clips of all its datasets, those to train on first.
        num_train_folders: how many of the datasets those are.

    Raises:
        UserError: the protocol does not fit the clips, the file of the folds cannot be used, or an AU is unknown.
    """
    data = config.data
    if data.folds_file is not None:
        plan = plan_from_file(Path(data.folds_file), store.samples)
        return dataclasses.replace(plan, aus=_known(tuple(data.aus) or plan.aus))
    train_corpora = sorted(set().union(*store.corpora[:num_train_folders]))
    test_corpora = sorted(set().union(*store.corpora[num_train_folders:]))
    corpora = tuple(sorted({*train_corpora, *test_corpora}))
    aus = _known(tuple(data.aus) or au_vocabulary(corpora, data.protocol))
    folds = make_folds(
        store.samples,
        data.protocol,
        seed=config.training.seed,
        inner_fraction=data.inner_fraction,
        num_folds=data.folds,
        train_corpora=train_corpora,
        test_corpora=test_corpora,
    )
    return FoldPlan(data.protocol, corpora, aus, config.training.seed, folds)


def _known(aus: tuple[int, ...]) -> tuple[int, ...]:
    unknown = [au for au in aus if au not in AU_NAMES]
    if unknown:
        raise UserError(f"data.aus names AU{unknown[0]}; allowed: {', '.join(map(str, AU_NAMES))}")
    return aus
