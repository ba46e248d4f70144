"""A compute node has no way to the Hub: a local backbone never asks it, and --offline refuses a name in one line."""

import os
import subprocess
import sys

from training_runs import TRAIN, overrides

# Every attempt to connect is written down and fails, as behind a closed firewall but at once.
BLOCKED = """
import runpy, socket, sys
def refuse(self, address):
    sys.stderr.write(f"CONNECTS {address}\\n")
    raise OSError("no network")
socket.socket.connect = refuse
socket.getaddrinfo = lambda *args, **kwargs: refuse(None, args[:2])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_blocked(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", BLOCKED, str(TRAIN), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def test_a_local_backbone_never_asks_the_hub(small_dataset, tiny_llm, tmp_path):
    settings = overrides(small_dataset, tiny_llm, tmp_path / "run", training__max_steps=1)
    result = run_blocked(*settings)
    assert result.returncode == 0, result.stderr
    assert "CONNECTS" not in result.stderr


def test_offline_refuses_a_name_without_asking(small_dataset, tmp_path):
    settings = overrides(small_dataset, "some-lab/some-llm", tmp_path / "run", training__max_steps=1)
    result = run_blocked("--offline", *settings)
    assert result.returncode == 2
    assert "CONNECTS" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith("train.py: error: backbone some-lab/some-llm: cannot be loaded")
    assert not (tmp_path / "run").exists()
