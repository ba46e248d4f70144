"""A whole run: folds trained one after another in one process group, the frozen base loaded once."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from aullm_dist.config import Config
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.protocols import FoldPlan, au_vocabulary, make_folds, select_fold, write_folds
from aullm_dist.errors import UserError
from aullm_dist.facs import AU_NAMES
from aullm_dist.log import get_logger
from aullm_dist.model.aullm import AULLM
from aullm_dist.model.relations import training_statistics
from aullm_dist.training import workspace
from aullm_dist.training.build import BuiltModel, build_model
from aullm_dist.training.context import on_main
from aullm_dist.training.fold import FoldTrainer
from aullm_dist.training.heldout import Score

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run leaves: its folder, the folds it trained and where its logs lie."""

    folder: Path
    folds: tuple[int, ...]


def run(accelerator: Accelerator, config: Config, mode: workspace.Mode, score: Score) -> RunResult:
    """Train every fold that the configuration asks for.

    Args:
        accelerator: from `context.start`.
        config: the run's configuration.
        mode: whether the run folder must be new, is continued or replaced.
        score: turns labels and logits into metrics.

    Raises:
        UserError: anything in the user's input that cannot work, before a step is trained.
    """
    folder = on_main(accelerator, lambda: workspace.open_run(config, mode))
    train_folders, test_folders = on_main(accelerator, lambda: workspace.datasets_of(config))
    store = ClipStore([*train_folders, *test_folders], config.data.size)
    plan = _fold_plan(config, store, len(train_folders))
    on_main(accelerator, lambda: write_folds(folder / "folds.json", plan))
    chosen = plan.folds if config.data.fold is None else (select_fold(plan.folds, config.data.fold),)
    logger.info(
        "Data: %d clips of %d subjects, %d fold%s (%s), AUs %s",
        len(store.samples),
        len({sample.subject for sample in store.samples}),
        len(plan.folds),
        "" if len(plan.folds) == 1 else "s",
        plan.protocol,
        ", ".join(map(str, plan.aus)),
    )
    llm_path = on_main(accelerator, lambda: workspace.backbone_of(config))
    built = build_model(config, plan.aus, llm_path)
    built.model.to(accelerator.device)
    if config.model.packing and isinstance(built.model, AULLM):
        with accelerator.autocast():
            deviation = built.model.reasoner.self_check()
        logger.info("Packing: equals the padded forward on this backbone to %.1g", deviation)
    initial = _snapshot(built.model)
    model = accelerator.prepare(built.model)
    for fold in chosen:
        _restore(built.model, initial)
        trainer = FoldTrainer(accelerator, config, built, model, store, fold, plan.aus, score)
        if config.model.training_statistics and built.relations is not None:
            _start_from_statistics(built, trainer.train_view.labels(plan.aus))
        logger.info(
            "Fold %d (%s): %d training, %d inner and %d test clips, %d steps of %d clips",
            fold.index, fold.name, len(fold.train), len(fold.inner), len(fold.test), trainer.total_steps,
            config.training.global_batch,
        )  # fmt: skip
        trainer.run(resume=mode == "resume")
    accelerator.wait_for_everyone()
    return RunResult(folder, tuple(fold.index for fold in chosen))


def _fold_plan(config: Config, store: ClipStore, num_train_folders: int) -> FoldPlan:
    data = config.data
    corpora = sorted({sample.corpus for sample in store.samples})
    test_corpora: list[str] = []
    if data.protocol == "cross":
        test_corpora = sorted({s.corpus for s in ClipStore(data.test, data.size).samples})
        corpora = sorted({s.corpus for s in ClipStore(data.train, data.size).samples})
    aus = tuple(data.aus) or au_vocabulary([*corpora, *test_corpora], data.protocol)
    unknown = [au for au in aus if au not in AU_NAMES]
    if unknown:
        raise UserError(f"data.aus names AU{unknown[0]}; allowed: {', '.join(map(str, AU_NAMES))}")
    folds = make_folds(
        store.samples,
        data.protocol,
        seed=config.training.seed,
        inner_fraction=data.inner_fraction,
        num_folds=data.folds,
        train_corpora=corpora,
        test_corpora=test_corpora,
    )
    return FoldPlan(data.protocol, tuple(sorted({*corpora, *test_corpora})), aus, config.training.seed, folds)


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy trainables and the buffers beside them to the CPU, so that each fold starts from the same state."""
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _start_from_statistics(built: BuiltModel, training_labels: np.ndarray) -> None:
    """Start the edge strengths from the co-activations of this fold's training clips; no other label is in reach."""
    first = training_statistics(built.relations, training_labels)
    with torch.no_grad():
        built.model.graph.edge_strength.copy_(torch.from_numpy(first))


def _restore(model: nn.Module, initial: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in initial:
                parameter.copy_(initial[name])
