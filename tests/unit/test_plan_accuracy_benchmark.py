"""The benchmark of plans: its bars refuse what they should, and its cases can be planned."""

import pytest
from benchmark_scripts import benchmark

from aullm_dist.config import load
from aullm_dist.llm.architecture import config_of


@pytest.fixture(scope="module")
def bench():
    with benchmark("plan_accuracy") as module:
        yield module


@pytest.mark.parametrize(("predicted", "lines"), [(109, 0), (111, 1), (91, 0), (89, 1)])
def test_a_peak_that_is_off_is_told(bench, predicted, lines):
    row = {"phases": {"run": {"predicted": predicted, "observed": 100}}, "traffic": None}
    assert len(bench.missed("case", row)) == lines


def test_bytes_that_are_off_are_told(bench):
    row = {"phases": {"run": {"predicted": 1, "observed": 1}}, "traffic": {"predicted": 97, "observed": 100}}
    assert bench.missed("case", row) == ["case: step is off by -3.0 %, allowed 2 %"]


@pytest.fixture(scope="module")
def on_fake_gpu():
    with benchmark("plan_on_fake_gpu") as module:
        yield module


@pytest.mark.parametrize("script", ["bench", "on_fake_gpu"])
def test_every_case_writes_a_run_file_with_its_architecture(bench, script, tmp_path, request):
    cases = request.getfixturevalue(script).CASES
    for name, case in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        config = load(bench.write_case(case, folder))
        assert config_of(config.model).hidden_size == case.architecture["hidden_size"]
        assert config.counterfactual.branches == 3
