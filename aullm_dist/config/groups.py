"""Chooses how many folds are trained side by side: equal groups that processes, batch and folds allow."""

from aullm_dist.config.sharding import HPZ, offloaded_to
from aullm_dist.config.strategy import Strategy
from aullm_dist.config.training_settings import TrainingConfig
from aullm_dist.errors import UserError


def check_groups(training: TrainingConfig, processes: int) -> None:
    """Refuse processes that `folds_at_once` does not divide, or that cannot share a global batch.

    Raises:
        UserError: naming what is allowed.
    """
    groups = training.folds_at_once
    if groups == "auto":
        if not _possible(training, processes):
            # What a single process cannot cut either: the batch alone is at fault.
            _check_batch(training, 1)
        return
    if processes % groups:
        divisors = ", ".join(str(number) for number in _divisors(processes))
        raise UserError(
            f"training.folds_at_once is {groups} with {processes} process{'es' * (processes > 1)}; allowed: a number "
            f"that divides them ({divisors}), or auto"
        )
    _check_batch(training, processes // groups)


def choose_groups(training: TrainingConfig, processes: int, folds: int) -> int:
    """Return how many folds are trained side by side.

    Args:
        training: the run file's values, after `check_groups`.
        processes: of the run.
        folds: that are to be trained.

    Raises:
        UserError: more are wanted than there are.
    """
    groups = training.folds_at_once
    if groups == "auto":
        possible = [number for number in _possible(training, processes) if number <= folds]
        if not possible:
            _check_batch(training, processes)
        return max(possible)
    if groups > folds:
        raise UserError(
            f"training.folds_at_once is {groups}, but {folds} fold{'s are' if folds > 1 else ' is'} to be trained; "
            f"allowed: 1 to {folds}, or auto"
        )
    return groups


def refuse_other_sharding(strategy: Strategy, training: TrainingConfig) -> None:
    """Refuse several folds at once with a strategy that divides more than the frozen LLM, or not over all processes.

    Raises:
        UserError: naming what is allowed.
    """
    if training.folds_at_once == 1 or strategy.deepspeed is None:
        return
    zero = strategy.deepspeed["zero_optimization"]
    offloads = any(offloaded_to(zero, name) != "none" for name in ("optimizer", "param"))
    if strategy.stage == 3 and not offloads and zero.get(HPZ, 1) == 1:
        return
    why = "shards what is trained over all processes" if strategy.stage < 3 else "offloads" if offloads else "is hpZ"
    raise UserError(
        f"training.folds_at_once is {training.folds_at_once} with training.strategy: {strategy.name}, which {why}; "
        "allowed: ddp, zero3, or a stage 3 JSON of your own without offloading and hpZ"
    )


def _possible(training: TrainingConfig, processes: int) -> list[int]:
    """Return the numbers of groups whose processes share a global batch."""
    return [
        number
        for number in _divisors(processes)
        if training.global_batch % (training.micro_batch * (processes // number)) == 0
    ]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _check_batch(training: TrainingConfig, processes: int) -> None:
    per_pass = training.micro_batch * processes
    if training.global_batch % per_pass:
        of_fold = "" if training.folds_at_once == 1 else " of a fold"
        raise UserError(
            f"training.global_batch is {training.global_batch}; allowed: a multiple of micro_batch x processes"
            f"{of_fold} = {training.micro_batch} x {processes} = {per_pass}"
        )
