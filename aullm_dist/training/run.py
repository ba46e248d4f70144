"""Trains a whole run, or several side by side: data, model and folder, then the folds, the frozen base loaded once."""

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from accelerate import Accelerator

from aullm_dist.config import Config, choose_groups, load_strategy
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.fold_plan import fold_plan
from aullm_dist.data.protocols import Fold, FoldPlan, select_fold
from aullm_dist.data.stratification import stratification
from aullm_dist.distributed import engine, engine_state
from aullm_dist.distributed.context import on_main, together
from aullm_dist.distributed.placement import placement_of
from aullm_dist.distributed.shared_base import base_section, shares_base
from aullm_dist.distributed.team import Team, divide
from aullm_dist.errors import UserError
from aullm_dist.files import write_text
from aullm_dist.llm.architecture import check_architecture
from aullm_dist.log import get_logger
from aullm_dist.model.assembly import BuiltModel
from aullm_dist.model.aullm import AULLM
from aullm_dist.monitoring.trackers import check_trackers
from aullm_dist.runs import workspace
from aullm_dist.runs.lifecycle import Life
from aullm_dist.runs.lock import RunLock, allow_locks
from aullm_dist.runs.paths import RunPaths
from aullm_dist.training.build import SharedLLM, build_model
from aullm_dist.training.fitting import refuse_what_does_not_fit
from aullm_dist.training.learner import Learners
from aullm_dist.training.teams import Work, train_folds

logger = get_logger(__name__)

_Stores: TypeAlias = dict[tuple[object, ...], ClipStore]


@dataclass(frozen=True, slots=True)
class Planned:
    """A run that may begin; nothing of it is in its folder yet but a corpus or a backbone of its own."""

    name: str
    """Among several; empty for one alone."""
    config: Config
    folder: Path
    store: ClipStore
    """All clips."""
    plan: FoldPlan
    folds: tuple[Fold, ...]
    """That are to be trained."""
    llm_path: str
    """Folder or Hugging Face name of the LLM."""


def run(accelerator: Accelerator, config: Config, mode: workspace.Mode, life: Life) -> Path:
    """Train every fold that the configuration asks for and return the run folder, as `run_all` does for several."""
    return run_all(accelerator, {"": config}, mode, life)[0]


def run_all(accelerator: Accelerator, configs: Mapping[str, Config], mode: workspace.Mode, life: Life) -> list[Path]:
    """Train every fold that the configurations ask for and return the run folders.

    Args:
        accelerator: from `context.start`.
        configs: of the runs, by name; several share LLM and engine (`runs.sweep`).
        mode: whether the run folders must be new, are continued or replaced.
        life: of these runs.

    Raises:
        UserError: anything in the user's input that cannot work, before a step is trained and before a run folder
            counts as a run.
        Preempted: all processes were asked to stop; what is done is in checkpoints.
    """
    for config in configs.values():
        refuse_compiled(config)
        check_trackers(config.monitor.trackers)
    life.loads()
    stores: _Stores = {}
    runs = [_planned(accelerator, name, config, mode, stores) for name, config in configs.items()]
    first, processes = runs[0].config, accelerator.num_processes
    folds = sum(len(each.folds) for each in runs)
    count = together(accelerator, lambda: choose_groups(first.training, processes, folds))
    team = divide(accelerator, count, first.training)
    _refuse_what_does_not_fit(accelerator, runs, count)
    shares = shares_base(first.training, processes) and first.model.llm != "none"
    sharding = base_section(first.training) if shares else _sharding(first, team)
    placement, llm = placement_of(accelerator, sharding), SharedLLM()

    def build(number: int) -> BuiltModel:
        each = runs[number]
        return build_model(each.config, each.plan.aus, each.llm_path, placement, llm=llm)

    # Not in `together`: the processes talk while they load, and agree there on what each finds in its files.
    learners = Learners(team, [each.config for each in runs], build, sharding if shares else None)
    _check_models(accelerator, runs, learners)
    locks = [RunLock(each.folder) for each in runs]

    def take_folders() -> None:
        allow_locks(folds)
        for each, lock in zip(runs, locks, strict=True):
            lock.take(fold.index for fold in each.folds)
        for each in runs:
            workspace.open_run(each.folder, each.config, mode, each.plan, each.store.fingerprint, sharding)
            _write_stratification(each.folder, each.plan, each.store)

    works = [
        Work(each.config, each.store, each.plan.aus, each.folds, resume=mode == "resume", name=each.name)
        for each in runs
    ]
    try:
        on_main(accelerator, take_folders)
        together(accelerator, life.begins)
        with learners.in_step(life.signals) as rounds:
            train_folds(team, works, learners, life, rounds)
    finally:
        for lock in locks:
            lock.release()
    accelerator.wait_for_everyone()
    learners.release()
    return [each.folder for each in runs]


def _planned(accelerator: Accelerator, name: str, config: Config, mode: workspace.Mode, stores: _Stores) -> Planned:
    folder = on_main(accelerator, lambda: workspace.check_run_folder(config, mode))
    # Before a corpus is drawn, which takes a minute.
    on_main(accelerator, lambda: workspace.check_llm(config))
    train_folders, test_folders = on_main(accelerator, lambda: workspace.datasets_of(config))
    folders, size, crops = (*train_folders, *test_folders), config.data.size, config.data.crops
    # Runs on the same clips hold them once.
    key = (*(path.resolve() for path in folders), size, crops)
    if key not in stores:
        stores[key] = together(accelerator, lambda: ClipStore(list(folders), size, crops))
    store = stores[key]
    # Checkpoints carry the configuration: whoever answers other clips with one finds there how they must be cut.
    config = config.changed({"data.crops": store.crops})
    plan = together(accelerator, lambda: fold_plan(config, store, len(train_folders)))
    chosen = plan.folds
    wanted = config.data.fold
    if wanted is not None:
        chosen = (together(accelerator, lambda: select_fold(plan.folds, wanted)),)
    _report_data(name, store, plan)
    llm_path = on_main(accelerator, lambda: workspace.backbone_of(config))
    on_main(accelerator, lambda: check_architecture(config.model, llm_path))
    return Planned(name, config, folder, store, plan, chosen, llm_path)


def _refuse_what_does_not_fit(accelerator: Accelerator, runs: Sequence[Planned], count: int) -> None:
    """Plan each kind of run once: seeds need the same memory."""
    planned: list[Config] = []
    for each in runs:
        config = each.config.changed({"training.folds_at_once": count})
        alike = config.changed({"training.seed": 0, "training.output": "any"})
        if alike not in planned:
            planned.append(alike)
            refuse_what_does_not_fit(accelerator, config, each.plan.aus, each.llm_path)


def _check_models(accelerator: Accelerator, runs: Sequence[Planned], learners: Learners) -> None:
    """Check the packing of every kind of prompt; all models are built for that, so one that cannot be is known now."""
    checked: list[object] = []
    for number, each in enumerate(runs):
        config, built = each.config, learners.of(number).built
        kind = (built.model_config.get("prompt"), config.model.readout)
        if kind not in checked:
            checked.append(kind)
            # Fails, if at all, after its last forward pass: no process leaves another in the engine.
            together(accelerator, functools.partial(check_packing, config, built))


def _sharding(config: Config, team: Team) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration of the engine, None for DDP; a network without an LLM is not partitioned."""
    if team.count > 1 or shares_base(config.training, team.num_processes):
        return None
    return engine.resolved(config.training, team.num_processes)


def refuse_compiled(config: Config) -> None:
    """Refuse compiled blocks where the engine gathers and frees their parameters in hooks inside of them."""
    if config.model.compile != "none" and load_strategy(config.training.strategy).stage == 3:
        raise UserError(
            f"model.compile is {config.model.compile!r} with training.strategy: {config.training.strategy}; allowed "
            "with ZeRO-3: none, as it gathers and frees the parameters inside of a block"
        )


def check_packing(config: Config, built: BuiltModel) -> None:
    """Check the packed forward against the padded one on the real backbone, as the engine holds it."""
    if config.model.packing and isinstance(built.model, AULLM):
        # The reasoner's own parameters: what gathers them is its forward pass, and the check goes around that.
        with engine_state.gathered(built.model.reasoner.parameters(recurse=False)):
            deviation = built.model.self_check()
        logger.info("Packing: differs from the padded forward on this backbone by %.1e (relative)", deviation)


def _report_data(name: str, store: ClipStore, plan: FoldPlan) -> None:
    logger.info(
        "%sData: %d clips of %d subjects, %d fold%s (%s), AUs %s",
        f"{name}: " if name else "",
        len(store.samples),
        len({sample.subject for sample in store.samples}),
        len(plan.folds),
        "" if len(plan.folds) == 1 else "s",
        plan.protocol,
        ", ".join(map(str, plan.aus)),
    )


def _write_stratification(folder: Path, plan: FoldPlan, store: ClipStore) -> None:
    """Write what readers of the run may want to know of the labels; nothing reads it back."""
    write_text(RunPaths(folder).stratification, json.dumps(stratification(plan, store.samples), indent=1) + "\n")
