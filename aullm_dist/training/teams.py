"""Trains the folds of a run, or of several: one after another, or side by side, each by a team of the processes."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aullm_dist import log
from aullm_dist.config import Config
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.order import total_steps
from aullm_dist.data.protocols import Fold
from aullm_dist.distributed import engine_state
from aullm_dist.distributed.board import Board
from aullm_dist.distributed.rounds import AgreementOfRounds, Rounds
from aullm_dist.distributed.team import Team, gather_objects, send_from_main
from aullm_dist.errors import CheckpointError, UserError
from aullm_dist.model.assembly import BuiltModel
from aullm_dist.model.relations import training_statistics
from aullm_dist.monitoring.overview import write_overview
from aullm_dist.runs.lifecycle import Life
from aullm_dist.runtime.preemption import Agreement, Preempted
from aullm_dist.training.fold import FoldTrainer
from aullm_dist.training.learner import FoldData, Learner, Learners


@dataclass(frozen=True, slots=True)
class Work:
    """What there is to do for a run."""

    config: Config
    store: ClipStore
    """All clips."""
    aus: tuple[int, ...]
    """AU numbers of the labels."""
    folds: tuple[Fold, ...]
    """That are to be trained."""
    resume: bool
    """Whether folds resume from their newest checkpoints."""
    name: str = ""
    """Of the run among several; empty for one alone."""


@dataclass(frozen=True, slots=True)
class Task:
    """A fold that a team trains."""

    number: int
    """Of the run, from 0."""
    work: Work
    """Of the run."""
    fold: Fold

    @property
    def steps(self) -> int:
        """Optimizer steps of the fold."""
        training = self.work.config.training
        return total_steps(len(self.fold.train), training.epochs, training.global_batch, training.max_steps)


def train_folds(
    team: Team, works: Sequence[Work], learners: Learners, life: Life, rounds: Rounds | None = None
) -> None:
    """Train all folds of all runs; every process calls it.

    Args:
        team: of this process.
        works: a run, or several on one LLM; the same on every process.
        learners: of this process.
        life: of the run.
        rounds: of an LLM that the teams share; None where each has one of its own.

    Raises:
        Preempted: all processes were asked to stop; what is done is in a checkpoint.
        UserError: a fold cannot be trained; the others are stopped.
    """
    tasks = tasks_of(works)
    if team.count == 1 and rounds is None:
        for place, task in enumerate(tasks, start=1):
            life.agreement.now()
            with _speaking_of(team, task, beside=False):
                _train(team, task, learners, life, (place, len(tasks)))
        return
    life.agreement.now()
    board, stop = Board(), None
    agreement: Agreement | AgreementOfRounds = (
        Agreement(team, life.signals, team.process_group, board)
        if rounds is None
        else AgreementOfRounds(rounds, life.signals)
    )
    try:
        with life.agreeing(agreement):
            for place, task in _taken(team, tasks, board):
                life.agreement.now()
                with _speaking_of(team, task, beside=True):
                    _train(team, task, learners, life, (place, len(tasks)))
            if rounds is not None:
                rounds.finish()
    except Preempted as asked:
        stop = asked
    except (UserError, CheckpointError) as error:
        if team.num_processes > 1 and not error.told_to_all:
            raise  # the rest of the team waits for this process, which can only leave
        if rounds is None:
            board.fail(error)
        elif rounds.has_failed:
            raise
        else:
            rounds.fail(error)
    _meet(team, board, life, stop)
    for work in works:
        _renew_overview(team, work)


def tasks_of(works: Sequence[Work]) -> list[Task]:
    """Return the folds of all runs, run by run."""
    return [Task(number, work, fold) for number, work in enumerate(works) for fold in work.folds]


def longest_first(tasks: Sequence[Task]) -> list[Task]:
    """Return the folds as teams take them: long ones first, so that none is left over at the end."""
    return sorted(tasks, key=lambda task: task.steps, reverse=True)


@contextlib.contextmanager
def _speaking_of(team: Team, task: Task, *, beside: bool) -> Iterator[None]:
    """A region whose lines begin with what they are about, of several runs, and where other teams train too."""
    with contextlib.ExitStack() as topics:
        if team.is_main_process and task.work.name:
            topics.enter_context(log.speaking(task.work.name))
        if team.is_main_process and beside:
            topics.enter_context(log.speaking(f"Fold {task.fold.index}"))
        yield


def _taken(team: Team, tasks: Sequence[Task], board: Board) -> Iterator[tuple[int, Task]]:
    """Yield the folds that this team gets, as it asks for them, each with its place among all."""
    queue = longest_first(tasks)
    while True:
        number = send_from_main(team, board.take() if team.is_main_process else 0)
        if number >= len(queue):
            return
        yield number + 1, queue[number]


def _meet(team: Team, board: Board, life: Life, stop: Preempted | None) -> None:
    """Wait for all teams, and stop if one of them was stopped, or has failed.

    Raises:
        Preempted, UserError: by every process alike.
    """

    def wait() -> None:
        life.signals.alive()
        if life.signals.received is not None:
            board.set()

    board.meet(team.accelerator.num_processes, wait)
    failure = board.failure()
    # Everybody has read the board when this is over, which ends with the process that keeps it.
    everybodys = gather_objects(team.accelerator, [None if stop is None else (stop.run, stop.fold, stop.step)])
    if failure is not None:
        failure.told_to_all = True
        raise failure
    stops = [where for where in everybodys[:: team.num_processes] if where is not None]
    if not stops:
        return
    everywhere = Preempted()
    # A team that had nothing left to train has no step.
    where = sorted((run, fold, step) for run, fold, step in stops if fold is not None and step is not None)
    if where:
        (everywhere.run, everywhere.fold, everywhere.step), *others = where
        everywhere.others = tuple(others)
    raise everywhere


def _train(team: Team, task: Task, learners: Learners, life: Life, place: tuple[int, int]) -> None:
    try:
        _train_fold(team, task, learners.of(task.number), life, place)
    except Preempted as stop:
        stop.run = task.work.name
        raise
    _renew_overview(team, task.work)


def _train_fold(team: Team, task: Task, learner: Learner, life: Life, place: tuple[int, int]) -> None:
    work, fold = task.work, task.fold
    config, built, start = work.config, learner.built, dict(learner.initial)
    if config.model.training_statistics and built.relations is not None:
        labels = work.store.view(fold.train).labels(work.aus)
        start["graph.edge_strength"] = _strengths_from_statistics(built, labels)
    engine_state.reset(built.model, learner.optimizer, start)
    data = FoldData(work.store, fold, work.aus)
    FoldTrainer(team, config, learner, data, life, place).run(resume=work.resume)


def _renew_overview(team: Team, work: Work) -> None:
    if work.config.monitor.tensorboard and team.accelerator.is_main_process:
        write_overview(Path(work.config.training.output), work.config)


def _strengths_from_statistics(built: BuiltModel, training_labels: np.ndarray) -> Tensor:
    """Return edge strengths from the co-activations of this fold's training clips; no other label is in reach."""
    assert built.relations is not None, "only a graph has edges"
    return torch.from_numpy(training_statistics(built.relations, training_labels))
