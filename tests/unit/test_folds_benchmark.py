"""The benchmark of folds side by side: its rows, its table, and losses that must not differ."""

import argparse
import math

import pytest
from benchmark_scripts import benchmark


@pytest.fixture(scope="module")
def folds():
    with benchmark("folds") as module:
        yield module


def test_every_number_of_processes_has_its_own_reference(folds):
    rows = list(folds.asked(argparse.Namespace(processes=[2, 4])))
    assert rows == [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


def test_other_losses_are_seen(folds):
    first = {"fold-00": [2.0, 1.0], "fold-01": [1.0]}
    assert folds.difference(first, {"fold-00": [2.0, 1.1], "fold-01": [1.0]}) == pytest.approx(0.1)
    assert folds.difference(first, {"fold-00": [2.0], "fold-01": [1.0]}) == math.inf
    assert folds.difference(first, {"fold-00": [2.0, 1.0]}) == math.inf


def test_the_table_compares_with_one_fold_after_another(folds):
    row = {"processes": 2, "micro_batch": 4, "packed_per_fold_step": 2.0 * 2**20, "gathered_per_fold_step": 3.0 * 2**20}
    row |= {"peaks": [2**20, 2**21], "difference": 1e-7}
    rows = [
        row | {"folds_at_once": 1, "seconds": 30.0},
        row | {"folds_at_once": 2, "seconds": 20.0},
        {"processes": 4, "folds_at_once": 1, "micro_batch": 2, "error": "took more than 9 s"},
    ]
    lines = folds.table(rows)
    assert lines[2] == "| 2 | 1 | 4 | 30.0 | 1.00x | 2.0 | 3.0 | 1 2 | 1e-07 |"
    assert "| 20.0 | 1.50x |" in lines[3]
    assert "took more than 9 s" in lines[4]
    assert len({line.count("|") for line in lines}) == 1


def _row(at_once, seconds, gathered, peak):
    numbers = {"seconds": seconds, "packed_per_fold_step": gathered, "peaks": [peak, peak - 1], "trained": 10}
    return {"processes": 4, "folds_at_once": at_once, **numbers}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (_row(4, 50.0, 26.0, 150), []),
        (_row(4, 50.1, 26.0, 150), ["2.00x faster"]),
        (_row(2, 75.0, 50.0, 150), ["1.33x faster, wanted 1.4x"]),
        (_row(4, 50.0, 27.0, 150), ["gathered 1.08/4 per fold-step"]),
        (_row(4, 50.0, 25.0, 151), ["at the peak, allowed"]),
        (_row(8, 101.0, 12.5, 150), ["0.99x faster, wanted 1.0x"]),
    ],
)
def test_a_bound_that_a_row_misses_is_told(folds, row, told):
    lines = folds.missed([_row(1, 100.0, 100.0, 100), row])
    assert len(lines) == len(told)
    assert all(part in line for part, line in zip(told, lines, strict=True))


def test_a_row_without_a_reference_misses_nothing(folds):
    failed = {"processes": 4, "folds_at_once": 1, "error": "took more than 9 s"}
    assert folds.missed([failed, _row(4, 500.0, 100.0, 999)]) == []
