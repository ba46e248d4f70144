"""A few kills of merges; `make test-faults` does fifty."""

import re
import subprocess
import sys

import pytest
from training_runs import ROOT

pytestmark = pytest.mark.launch


def test_killed_merges_end_in_the_same_bytes():
    command = [sys.executable, str(ROOT / "tests" / "faults" / "merge_kills.py"), "--kills", "6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kills, unfinished, failed = map(int, re.findall(r"\d+", done.stdout.splitlines()[-1]))
    assert (kills, failed) == (6, 0)
    assert unfinished > 0
