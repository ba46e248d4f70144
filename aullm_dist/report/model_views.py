"""Opens checkpoints and datasets of a run for a report, and reads each once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator

from aullm_dist.checkpoint.retention import list_checkpoints
from aullm_dist.config import load_recorded
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.protocols import Fold, read_folds
from aullm_dist.data.records import INFO_NAME
from aullm_dist.distributed import context
from aullm_dist.errors import UserError
from aullm_dist.files import read_json
from aullm_dist.prediction.explain import ExplainedClips, explain_clips
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runs.recorded import find_recorded
from aullm_dist.training.trained import Trained, find_trained


@dataclass(slots=True)
class Models:
    """Loads checkpoints for a report.

    Attributes:
        datasets: prepared datasets to look at; none takes those of each run.
        fold: the fold whose checkpoint is looked at; None takes a run's first fold with a checkpoint.
        overrides: `section.key=value` of `training.trained.CHANGEABLE`.
    """

    datasets: Sequence[Path] = ()
    fold: int | None = None
    overrides: Sequence[str] = ()
    _accelerator: Accelerator | None = field(default=None, init=False)

    def fold_of(self, run: Path) -> Fold:
        """Return the fold whose checkpoint is looked at.

        Raises:
            UserError: no fold has a checkpoint, or the run has no such fold.
        """
        folds = read_folds(RunPaths(run).folds_file).folds
        wanted = [fold for fold in folds if self.fold in (None, fold.index)]
        if not wanted:
            raise UserError(f"--fold {self.fold}: {run} has the folds 0 to {len(folds) - 1}")
        for fold in wanted:
            if list_checkpoints(RunPaths(run).fold(fold.index).checkpoints):
                return fold
        which = "any fold" if self.fold is None else f"fold {self.fold}"
        raise UserError(f"{run}: there is no checkpoint of {which}; features and pictures of the model need one")

    def store_of(self, run: Path, trained: Trained) -> ClipStore:
        """Open the clips that a run's model is shown.

        Raises:
            UserError: they are not there, are of another size or crop, or are not those that the run was trained on.
        """
        size, crops = trained.config.data.size, trained.config.data.crops
        if self.datasets:
            return ClipStore(self.datasets, size, crops)
        config = load_recorded(RunPaths(run).config)
        named = [
            find_recorded(path, config.training.output, run.absolute() / "fold") or Path(path)
            for path in (*config.data.train, *config.data.test)
        ]
        if named:
            return _of_the_run(run, [ClipStore(named, size, crops)])
        # A synthetic corpus lies below the run, perhaps next to those of earlier settings.
        folders = sorted(path.parent for path in RunPaths(run).datasets.glob(f"*/{INFO_NAME}"))
        if not folders:
            raise UserError(
                f"{RunPaths(run).datasets}: the run's synthetic corpus is gone; train again, or give --data"
            )
        return _of_the_run(run, [ClipStore([folder], size, crops) for folder in folders])

    def explain(self, run: Path, fold: Fold, store: ClipStore | None = None) -> tuple[ExplainedClips, ClipStore]:
        """Show the clips of `store`, or those of the run, to the newest valid checkpoint of a fold.

        Raises:
            UserError: there is none, or checkpoint, LLM or datasets cannot be used.
        """
        trained = find_trained(RunPaths(run).fold(fold.index).folder, self.overrides, 1)
        store = store or self.store_of(run, trained)
        if self._accelerator is None:
            self._accelerator = context.start(trained.config.training)
        return explain_clips(self._accelerator, trained, store), store


def _of_the_run(run: Path, stores: Sequence[ClipStore]) -> ClipStore:
    wanted = read_json(RunPaths(run).environment, "give the datasets with --data").get("data_sha256")
    for store in stores:
        if store.fingerprint == wanted:
            return store
    raise UserError(f"{run}: its datasets changed since it was trained; give those to use with --data")
