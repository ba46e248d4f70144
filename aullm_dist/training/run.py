"""A whole run: folds trained one after another in one process group, the frozen base loaded once."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from aullm_dist.config import Config, load_strategy
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.protocols import FoldPlan, au_vocabulary, make_folds, plan_from_file, select_fold
from aullm_dist.data.stratification import stratification
from aullm_dist.errors import UserError
from aullm_dist.facs import AU_NAMES
from aullm_dist.files import write_text
from aullm_dist.log import get_logger
from aullm_dist.model.architecture import check_architecture
from aullm_dist.model.aullm import AULLM
from aullm_dist.model.relations import training_statistics
from aullm_dist.training import engine, engine_state, workspace
from aullm_dist.training.build import BuiltModel, build_model
from aullm_dist.training.context import on_main, together
from aullm_dist.training.fitting import refuse_what_does_not_fit
from aullm_dist.training.fold import FoldTrainer
from aullm_dist.training.heldout import Score
from aullm_dist.training.life import Life
from aullm_dist.training.lock import RunLock
from aullm_dist.training.monitor_folds import write_overview
from aullm_dist.training.optimizer import build_optimizer
from aullm_dist.training.placement import placement_of

logger = get_logger(__name__)


def run(accelerator: Accelerator, config: Config, mode: workspace.Mode, score: Score, life: Life) -> Path:
    """Train every fold that the configuration asks for and return the run folder.

    Args:
        accelerator: from `context.start`.
        config: the run's configuration.
        mode: whether the run folder must be new, is continued or replaced.
        score: turns labels and logits into metrics.
        life: of this run.

    Raises:
        UserError: anything in the user's input that cannot work, before a step is trained and before the run folder
            counts as a run.
        Preempted: all processes were asked to stop; what is done is in a checkpoint.
    """
    refuse_compiled(config)
    life.loads()
    folder = on_main(accelerator, lambda: workspace.check_run_folder(config, mode))
    train_folders, test_folders = on_main(accelerator, lambda: workspace.datasets_of(config))
    data = config.data
    store = together(accelerator, lambda: ClipStore([*train_folders, *test_folders], data.size, data.crops))
    # Checkpoints carry the configuration: whoever answers other clips with one finds there how they must be cut.
    data.crops = list(store.crops)
    plan = together(accelerator, lambda: _fold_plan(config, store, len(train_folders)))
    chosen = plan.folds
    if config.data.fold is not None:
        chosen = (together(accelerator, lambda: select_fold(plan.folds, config.data.fold)),)
    _report_data(store, plan)
    llm_path = on_main(accelerator, lambda: workspace.backbone_of(config))
    on_main(accelerator, lambda: check_architecture(config.model, llm_path))
    refuse_what_does_not_fit(accelerator, config, plan.aus, llm_path)
    sharding = engine.resolved(config.training, accelerator.num_processes)
    placement = placement_of(accelerator, sharding)
    # Not in `together`: the processes talk while they load, and agree there on what each finds in its files.
    built = build_model(config, plan.aus, llm_path, placement)
    built.model.to(accelerator.device)
    initial = _snapshot(built.model)
    model, optimizer = engine.prepare(accelerator, built.model, build_optimizer(built.model, config.training))
    # Fails, if at all, after its last forward pass: no process leaves another in the engine.
    together(accelerator, lambda: self_check(config, built))
    lock = RunLock(folder)

    def open_run() -> None:
        lock.take(fold.index for fold in chosen)
        workspace.open_run(folder, config, mode, plan, store.fingerprint, sharding)
        _write_stratification(folder, plan, store)

    try:
        on_main(accelerator, open_run)
        together(accelerator, life.begins)
        for place, fold in enumerate(chosen, start=1):
            life.agreement.now()
            start = initial
            if config.model.training_statistics and built.relations is not None:
                labels = store.view(fold.train).labels(plan.aus)
                start = {**initial, "graph.edge_strength": _strengths_from_statistics(built, labels)}
            engine_state.reset(built.model, optimizer, start)
            trainer = FoldTrainer(
                accelerator, config, built, model, optimizer, store, fold, plan.aus, score, life, (place, len(chosen))
            )
            trainer.run(resume=mode == "resume")
            if config.monitor.tensorboard and accelerator.is_main_process:
                write_overview(folder, config, score)
    finally:
        lock.release()
    accelerator.wait_for_everyone()
    engine.release(accelerator, model)
    return folder


def refuse_compiled(config: Config) -> None:
    """Refuse compiled blocks where the engine gathers and frees their parameters in hooks inside of them."""
    if config.model.compile != "none" and load_strategy(config.training.strategy).stage == 3:
        raise UserError(
            f"model.compile is {config.model.compile!r} with training.strategy: {config.training.strategy}; allowed "
            "with ZeRO-3: none, as it gathers and frees the parameters inside of a block"
        )


def self_check(config: Config, built: BuiltModel) -> None:
    """Check the packed forward against the padded one on the real backbone, as the engine holds it."""
    if config.model.packing and isinstance(built.model, AULLM):
        # The reasoner's own parameters: what gathers them is its forward pass, and the check goes around that.
        with engine_state.gathered(built.model.reasoner.parameters(recurse=False)):
            deviation = built.model.self_check()
        logger.info("Packing: differs from the padded forward on this backbone by %.1e (relative)", deviation)


def _report_data(store: ClipStore, plan: FoldPlan) -> None:
    logger.info(
        "Data: %d clips of %d subjects, %d fold%s (%s), AUs %s",
        len(store.samples),
        len({sample.subject for sample in store.samples}),
        len(plan.folds),
        "" if len(plan.folds) == 1 else "s",
        plan.protocol,
        ", ".join(map(str, plan.aus)),
    )


def _fold_plan(config: Config, store: ClipStore, num_train_folders: int) -> FoldPlan:
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


def _write_stratification(folder: Path, plan: FoldPlan, store: ClipStore) -> None:
    """Write what readers of the run may want to know of the labels; nothing reads it back."""
    write_text(folder / "stratification.json", json.dumps(stratification(plan, store.samples), indent=1) + "\n")


def _known(aus: tuple[int, ...]) -> tuple[int, ...]:
    unknown = [au for au in aus if au not in AU_NAMES]
    if unknown:
        raise UserError(f"data.aus names AU{unknown[0]}; allowed: {', '.join(map(str, AU_NAMES))}")
    return aus


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy the trainables to the CPU, so that each fold starts from the same state."""
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _strengths_from_statistics(built: BuiltModel, training_labels: np.ndarray) -> Tensor:
    """Return edge strengths from the co-activations of this fold's training clips; no other label is in reach."""
    return torch.from_numpy(training_statistics(built.relations, training_labels))
