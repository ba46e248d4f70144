"""Benchmarks whose work is done by processes of their own: they run, and find what they must."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.launch


def test_the_step_needs_neither_deepspeed_nor_datasets():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('deepspeed', 'datasets', 'pyarrow', 'tensorboard'))); "
        f"sys.path.insert(0, {str(BENCHMARKS)!r}); import train_step; print(sorted(train_step.PRESETS))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "70b-nf4" in done.stdout, done.stderr


def test_two_processes_load_an_llm_in_pieces_within_the_bars(tmp_path):
    command = ["load_memory.py", "--ranks", "2", "--gib", "0.1", "--modes", "pieces", "--json", "report.json"]
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / command[0]), *command[1:]],
        check=False, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = json.loads((tmp_path / "report.json").read_text())["rows"]["pieces"]
    assert len(ranks) == 2
    # Each reads its own half of what is divided, and both the norms.
    assert all(0 < rank["read_share"] < 0.5 for rank in ranks)
    assert all(math.isfinite(loss) for rank in ranks for loss in rank["losses"])
