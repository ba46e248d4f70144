"""Sample order is a pure function of (seed, position), whatever the number of processes."""

from itertools import chain

import pytest

from aullm_dist.data.order import BatchPlan, SampleStream, generator, total_steps


def _stream(processes: int, micro_batch: int, steps: int) -> list[list[int]]:
    """Positions of each global batch, over all processes, sorted."""
    batches = []
    for step in range(steps):
        plans = [BatchPlan(8, micro_batch, processes, rank) for rank in range(processes)]
        batches.append(sorted(chain.from_iterable(chain.from_iterable(plan.positions(step) for plan in plans))))
    return batches


@pytest.mark.parametrize(("processes", "micro_batch"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_each_step_takes_the_same_clips_for_every_split(processes, micro_batch):
    assert _stream(processes, micro_batch, 3) == [list(range(s * 8, s * 8 + 8)) for s in range(3)]


def test_every_epoch_is_a_permutation_and_epochs_differ():
    stream = SampleStream(11, seed=4)
    epochs = [[stream.at(e * 11 + i) for i in range(11)] for e in range(3)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(i for _, i in epoch) == list(range(11))
    assert len({tuple(i for _, i in epoch) for epoch in epochs}) == 3


def test_order_depends_on_the_seed_alone():
    first = [SampleStream(20, seed=1).at(p) for p in range(20)]
    assert first == [SampleStream(20, seed=1).at(p) for p in range(20)]
    assert first != [SampleStream(20, seed=2).at(p) for p in range(20)]


def test_generators_are_keyed_by_every_key():
    draws = {
        generator(*keys).integers(2**62)
        for keys in [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a", 1, "x")]
    }
    assert len(draws) == 5
    assert generator(0, "a", 1).integers(2**62) == generator(0, "a", 1).integers(2**62)


def test_the_last_epoch_is_the_one_that_was_asked_for():
    """The last step takes what its batch lacks from the next epoch, which is not trained for that."""
    from types import SimpleNamespace

    from aullm_dist.config import load
    from aullm_dist.training.fold import FoldTrainer

    for clips, batch, epochs in ((3, 16, 2), (5, 4, 2), (7, 8, 3)):
        config = load(None, [f"training.epochs={epochs}", f"training.global_batch={batch}", "training.micro_batch=1"])
        trainer = SimpleNamespace(config=config, train_view=range(clips))
        last = total_steps(clips, epochs, batch, None)
        assert FoldTrainer._epoch(trainer, last) == epochs
        assert all(FoldTrainer._epoch(trainer, step) < epochs for step in range(last))
