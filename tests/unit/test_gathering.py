"""What ZeRO-3 holds whole during passes, on hand-made modules in a row."""

from aullm_dist.planning.gathering import Gatherer, Limits
from aullm_dist.planning.recorder import Record
from aullm_dist.planning.skeleton import Weight


def _line(names):
    """Return weights of three modules in a row, 100 elements of 2 bytes each, and the records of both passes."""
    weights = [Weight(f"{name}.weight", name, False, 100, 2, 100, 0, False) for name in names]
    forward = [r for n in names for r in (Record("fetch", n), Record("release", n))]
    backward = [
        r for n in reversed(names) for r in (Record("fetch", n, forward=False), Record("release", n, forward=False))
    ]
    return weights, [*forward, Record("middle"), *backward]


def test_without_reuse_every_module_is_gathered_in_each_pass():
    weights, records = _line("abc")
    gatherer = Gatherer(weights, 4, Limits(live=100, reuse=0, prefetch=0, persistent=0), copies_on_receipt=False)
    for _ in range(2):
        found = gatherer.passes(records)
        gatherer.partition_all()
    # Three modules twice, 25 of 100 elements each; never more than one is whole.
    assert (found.messages, found.gathers, found.peak) == (6 * 50, 6, 200)


def test_within_the_reuse_distance_modules_stay():
    weights, records = _line("abc")
    gatherer = Gatherer(weights, 4, Limits(live=1000, reuse=1000, prefetch=0, persistent=0), copies_on_receipt=False)
    gatherer.passes(records)
    gatherer.partition_all()
    found = gatherer.passes(records)
    assert (found.messages, found.gathers) == (3 * 50, 3)
    assert found.peak == 600


def test_small_parameters_are_sent_once_a_step():
    weights, records = _line("abc")
    gatherer = Gatherer(weights, 4, Limits(live=100, reuse=0, prefetch=0, persistent=100), copies_on_receipt=False)
    assert gatherer.passes(records).messages == 0
    assert gatherer.persistent_messages() == 3 * 50


def test_what_is_fetched_ahead_takes_space_twice():
    weights, records = _line("abcd")
    limits = Limits(live=1000, reuse=0, prefetch=200, persistent=0)
    gatherer = Gatherer(weights, 2, limits, copies_on_receipt=False)
    alone = gatherer.passes(records)
    gatherer.partition_all()
    ahead = gatherer.passes(records)
    assert ahead.gathers < alone.gathers
    # Two parameters at a time: b and c, of which c waits yet, and d with the next one that will be needed.
    assert ahead.in_transit == 2 * 2 * 200
