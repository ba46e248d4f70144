"""The command line: help, one-line errors with exit code 2, and a reader that goes away."""

import subprocess
import sys

import pytest

from aullm_dist.cli import main


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    for command in ("prepare", "synthesize", "quantize", "config", "evaluate", "checkpoint"):
        assert command in text
    assert "A first run needs neither corpus nor LLM: aullm-dist train" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["config", "no_such_run"], "no such run file"),
        (["config", "demo", "training.sed=1"], "did you mean 'seed'"),
        (["evaluate", "/no/such/run"], "/no/such/run"),
        (["checkpoint", "verify", "/no/such/run"], "/no/such/run"),
        (["prepare", "casme2", "--root", "/no/such/root", "--out", "/tmp/never"], "/no/such/root"),
        (["quantize", "/no/such/base", "--out", "/tmp/never"], "/no/such/base"),
        (["synthesize", "casme2", "--out", "/dev/null/x"], "/dev/null/x"),
        (["synthesize", "casme2", "--out", "/tmp/never", "--subjects", "0"], "subjects"),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, part):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("aullm-dist: error: ")
    assert part in line
    assert not captured.out


def test_config_prints_a_run_file_that_loads_again(capsys, tmp_path):
    assert main(["config", "demo", "training.seed=7"]) == 0
    path = tmp_path / "again.yaml"
    path.write_text(capsys.readouterr().out)
    assert main(["config", str(path)]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m aullm_dist.cli config | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr
