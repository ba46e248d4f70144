"""How many folds may be trained side by side, who takes which, and what is refused in one line."""

import threading

import pytest
import torch.distributed as dist

from aullm_dist.config import TrainingConfig, check_groups, choose_groups, load, load_strategy, refuse_other_sharding
from aullm_dist.data.protocols import Fold
from aullm_dist.distributed import board as board_module
from aullm_dist.distributed.board import Board
from aullm_dist.errors import CheckpointError, UserError
from aullm_dist.training.teams import Task, Work, longest_first


def training(folds_at_once, global_batch=16, micro_batch=2):
    return TrainingConfig(folds_at_once=folds_at_once, global_batch=global_batch, micro_batch=micro_batch)


@pytest.mark.parametrize(
    ("wanted", "processes", "folds", "found"),
    [
        (1, 8, 26, 1),
        (4, 8, 26, 4),
        (8, 8, 8, 8),
        ("auto", 8, 26, 8),
        ("auto", 8, 5, 4),
        ("auto", 6, 26, 6),
        ("auto", 1, 1, 1),
    ],
)
def test_groups_divide_processes_and_are_no_more_than_folds(wanted, processes, folds, found):
    check_groups(training(wanted), processes)
    assert choose_groups(training(wanted), processes, folds) == found


def test_auto_takes_only_groups_that_can_share_a_batch():
    # Three processes cannot share 16 clips; six groups of one can each take all of them.
    assert choose_groups(training("auto", micro_batch=16), 6, 26) == 6
    with pytest.raises(UserError, match="multiple of micro_batch x processes"):
        choose_groups(training("auto", micro_batch=16), 6, 2)


@pytest.mark.parametrize(
    ("wanted", "processes", "message"),
    [
        (3, 8, r"folds_at_once is 3 with 8 processes; allowed: a number that divides them \(1, 2, 4, 8\), or auto"),
        (2, 1, r"folds_at_once is 2 with 1 process; allowed"),
        (1, 3, "multiple of micro_batch x processes = 2 x 3"),
        (2, 6, "multiple of micro_batch x processes of a fold = 2 x 3"),
    ],
)
def test_groups_that_do_not_divide_are_refused(wanted, processes, message):
    with pytest.raises(UserError, match=message):
        check_groups(training(wanted), processes)


def test_more_groups_than_folds_are_refused():
    with pytest.raises(UserError, match="folds_at_once is 4, but 3 folds are to be trained; allowed: 1 to 3, or auto"):
        choose_groups(training(4), 8, 3)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero2_offload", "zero3_hpz", "zero3_offload_param"])
def test_strategies_that_divide_more_than_the_base_are_refused(strategy):
    refuse_other_sharding(load_strategy(strategy), training(1))
    for wanted in (2, "auto"):
        with pytest.raises(UserError, match=f"strategy: {strategy}, which .*; allowed: ddp, zero3"):
            refuse_other_sharding(load_strategy(strategy), training(wanted))


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_strategies_that_keep_what_is_trained_in_its_group_are_allowed(strategy):
    refuse_other_sharding(load_strategy(strategy), training(2))


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", "true"])
def test_other_values_are_refused(value):
    with pytest.raises(UserError, match=r"training\.folds_at_once is"):
        load(None, [f"training.folds_at_once={value}"])


def test_run_files_say_a_number_or_auto():
    assert load(None, ["training.folds_at_once=auto"]).training.folds_at_once == "auto"
    assert load(None, ["training.folds_at_once=2", "training.processes=2", "training.micro_batch=2"])


def test_long_folds_are_taken_first():
    sizes = {0: 3, 1: 9, 2: 9, 3: 40}
    folds = tuple(Fold(i, str(i), tuple(map(str, range(n))), (), ()) for i, n in sizes.items())
    config = load(None, ["training.global_batch=4", "training.micro_batch=4", "training.epochs=2"])
    longer = config.changed({"training.epochs": 8})
    works = [Work(config, None, (), folds, resume=False), Work(longer, None, (), folds[:2], resume=False)]
    tasks = [Task(number, work, fold) for number, work in enumerate(works) for fold in work.folds]
    taken = longest_first(tasks)
    assert [(task.number, task.fold.index) for task in taken] == [(0, 3), (1, 1), (1, 0), (0, 1), (0, 2), (0, 0)]


def boards(count, monkeypatch):
    monkeypatch.setattr(board_module, "_RUNS", iter([0] * count))
    store = dist.HashStore()
    return [Board(store) for _ in range(count)]


def test_every_fold_is_taken_once(monkeypatch):
    taken = [board.take() for board in boards(3, monkeypatch) for _ in range(4)]
    assert taken == list(range(12))


def test_all_see_what_one_writes(monkeypatch):
    first, second = boards(2, monkeypatch)
    assert not second.is_set()
    assert second.failure() is None
    monkeypatch.setattr(board_module.dist, "get_rank", lambda: 5)
    first.fail(CheckpointError("disk full"))
    assert second.is_set()
    failure = second.failure()
    assert type(failure) is CheckpointError
    assert str(failure) == "process 5: disk full"


def test_who_is_done_waits_for_the_others(monkeypatch):
    first, second = boards(2, monkeypatch)
    waits = []
    done = threading.Event()

    def meet():
        first.meet(2, lambda: waits.append(1))
        done.set()

    waiting = threading.Thread(target=meet)
    waiting.start()
    assert not done.wait(0.3)
    second.meet(2, lambda: None)
    waiting.join(5)
    assert done.is_set()
    assert waits
