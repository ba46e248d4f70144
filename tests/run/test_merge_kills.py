"""A few kills of merges; `make test-faults` does fifty."""

import re

import pytest
from training_runs import ROOT, fork

pytestmark = pytest.mark.launch


def test_killed_merges_end_in_the_same_bytes():
    done = fork("--kills", "6", program=ROOT / "tests" / "faults" / "merge_kills.py")
    assert done.returncode == 0, done.stdout + done.stderr
    kills, unfinished, failed = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert (kills, failed) == (6, 0)
    assert unfinished > 0
