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


def configurations(driver, side):
    options = Namespace(out=Path("/out"), epochs=8)
    datasets = {(c, s): Path("/data") / f"{c}-{s}" for c in driver.CORPORA for s in (driver.SEEN, driver.HELD_OUT)}
    return [driver.configuration(options, datasets, Path("/llm"), arm, 1, side) for arm in driver.ARMS]


def test_the_camera_of_the_test_clips_is_in_no_training_clip(driver):
    for config in configurations(driver, ("cross", "casme2", "samm")):
        assert config.data.train == ["/data/casme2-none"]
        assert config.data.test == ["/data/samm-vignette_banding"]
    for config in configurations(driver, ("grouped", "casme2", "casme2")):
        assert config.data.train == ["/data/casme2-none"]
        assert (config.data.test, config.data.folds) == ([], 5)


def test_every_arm_is_trained_alike_and_stays_the_arm_of_its_run_file(driver):
    found = configurations(driver, ("cross", "4dme", "samm"))
    assert [arm_of(config) for config in found] == [arm_of(load(find_config(f"ablation/{a}"))) for a in driver.ARMS]
    assert {arm_of(config) for config in found} == set(NAMES)
    assert len({(c.training.epochs, c.training.seed, c.training.lr_new, c.data.inner_fraction) for c in found}) == 1
    assert len({config.training.output for config in found}) == len(driver.ARMS)
