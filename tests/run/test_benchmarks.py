"""Benchmarks whose work is done by processes of their own: they run, and find what they must."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import fork

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# A processor without bfloat16 arithmetic takes ten times as long for the step of the load benchmark.
pytestmark = [pytest.mark.launch, pytest.mark.timeout(1800)]


def test_the_step_needs_neither_deepspeed_nor_datasets():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('deepspeed', 'datasets', 'pyarrow', 'tensorboard'))); "
        f"sys.path.insert(0, {str(BENCHMARKS)!r}); import train_step; print(sorted(train_step.PRESETS))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "70b-nf4" in done.stdout, done.stderr


def test_two_processes_load_an_llm_in_pieces_within_the_bars(tmp_path):
    report = tmp_path / "report.json"
    options = ("--ranks", "2", "--gib", "0.1", "--modes", "pieces", "--json", str(report))
    done = fork(*options, program=BENCHMARKS / "load_memory.py", limit=1700.0)
    assert done.returncode == 0, done.stderr
    ranks = json.loads(report.read_text())["rows"]["pieces"]
    assert len(ranks) == 2
    # Each reads its own half of what is divided, and both the norms.
    assert all(0 < rank["read_share"] < 0.5 for rank in ranks)
    assert all(math.isfinite(loss) for rank in ranks for loss in rank["losses"])
