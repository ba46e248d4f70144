"""A small part of the fault suite; `make test-faults` runs all of it."""

import re

import pytest
from training_runs import ROOT, fork

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]


def test_a_small_part_of_the_fault_suite():
    done = fork("--quick", program=ROOT / "tests" / "faults" / "suite.py", limit=1700)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| (.+?) \| (\d+) \| (\d+) \|", done.stdout, re.MULTILINE)
    assert all(tried == recovered for _, tried, recovered in rows)
    names = " ".join(name for name, _, _ in rows)
    for part in (
        "in step",
        "in save",
        "newest checkpoint",
        "disk full",
        "write permission",
        "second run",
        "2 folds at once",
    ):
        assert part in names, done.stdout
    assert next(int(tried) for name, tried, _ in rows if name == "all kills") >= 4
