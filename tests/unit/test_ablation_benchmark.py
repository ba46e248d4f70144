"""The driver of the synthetic ablation: what each run is trained and tested on."""

from argparse import Namespace
from pathlib import Path

import pytest
from benchmark_scripts import benchmark

from aullm_dist.config import find_config, load
from aullm_dist.report.arms import NAMES, arm_of


@pytest.fixture(scope="module")
def driver():
    with benchmark("ablation") as module:
        yield module


def configurations(driver, side, monkeypatch):
    options = Namespace(out=Path("/out"), epochs=8, subjects=20, clips=12, amplitude=2.0, balance=1.0, generator=220)
    monkeypatch.setattr(driver, "write_dataset", lambda options, corpus, shift, seed: Path(f"/data/{corpus}-{shift}"))
    monkeypatch.setattr(driver, "one_group", lambda dataset: dataset / "one.json")
    datasets = driver.datasets_of(options, side, 1)
    return [driver.configuration(options, datasets, Path("/llm"), arm, 1, side) for arm in driver.ARMS]


def test_the_camera_of_the_test_clips_is_in_no_training_clip(driver, monkeypatch):
    for config in configurations(driver, ("cross", "casme2", "samm"), monkeypatch):
        assert config.data.train == ("/data/casme2-corpus",)
        assert config.data.test == ("/data/samm-vignette_banding",)
    for config in configurations(driver, ("grouped", "casme2", "casme2"), monkeypatch):
        assert config.data.train == ("/data/casme2-corpus",)
        assert (config.data.test, config.data.folds_file) == ((), "/data/casme2-corpus/one.json")


def test_every_arm_is_trained_alike_and_stays_the_arm_of_its_run_file(driver, monkeypatch):
    found = configurations(driver, ("cross", "4dme", "samm"), monkeypatch)
    assert [arm_of(config) for config in found] == [arm_of(load(find_config(f"ablation/{a}"))) for a in driver.ARMS]
    assert {arm_of(config) for config in found} == set(NAMES)
    assert len({(c.training.epochs, c.training.seed, c.training.lr_new, c.data.inner_fraction) for c in found}) == 1
    assert len({config.training.output for config in found}) == len(driver.ARMS)
