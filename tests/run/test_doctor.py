"""The doctor names the node and the reason, in seconds: nothing here waits for a time-out of a library."""

import os
import socket
import subprocess
import sys
import time

import pytest
from nursery import Task
from training_runs import free_port, nursery

from aullm_dist import cli

pytestmark = pytest.mark.launch
TIMEOUT = 3.0


def tasks(folder, port, *, changes=(), arguments=(), size=2, start=None):
    """Run `doctor --distributed` as srun would on nodes n1, n2; return exit codes, outputs and seconds.

    By default the processes are forked; `start_anew` starts them.
    """
    given = []
    for rank in range(size):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(size),
            "SLURMD_NODENAME": f"n{rank + 1}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        environment |= dict(changes[rank]) if rank < len(changes) else {}
        command = ["doctor", "--distributed", "--quick", f"--timeout={TIMEOUT}"]
        command += [*(arguments[rank] if rank < len(arguments) else (f"--folder={folder}",))]
        given.append(Task("aullm_dist.cli", command, environment, is_module=True))
    nursery()  # its own start is not timed
    begun = time.monotonic()
    codes, outputs = (start or forked)(given)
    return codes, outputs, time.monotonic() - begun


def forked(given):
    ended = nursery().run(given, limit=60, together=False)
    return ended.codes, [out + error for out, error in zip(ended.outputs, ended.errors, strict=True)]


def start_anew(given):
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", task.program, *task.arguments],
            env=task.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )  # fmt: skip
        for task in given
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    return [process.returncode for process in processes], outputs


def test_nodes_that_agree(tmp_path):
    codes, (main, other), _ = tasks(tmp_path, free_port(), start=start_anew)
    assert codes == [0, 0], main + other
    assert "2 tasks met at 127.0.0.1" in main
    assert "every node reads what every other wrote" in main
    assert "the same on 2 tasks" in main
    assert "clocks       within 0." in main
    assert "nothing stands in the way" in main
    assert other == ""
    assert list(tmp_path.iterdir()) == []


def test_a_port_in_use(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        codes, (main,), seconds = tasks(tmp_path, port, size=1)
    assert codes == [2]
    assert f"n1: port {port} of 127.0.0.1 is in use" in main
    assert seconds < 10


def test_a_wrong_master(tmp_path):
    codes, (main, other), seconds = tasks(tmp_path, free_port(), changes=[{}, {"MASTER_ADDR": "127.0.0.2"}])
    assert codes == [1, 2], main + other
    assert "task 1 (task 1) did not come" in main
    assert "n2: task 0 was not reached at 127.0.0.2" in other
    assert "Connection refused" in other
    assert seconds < 4 * TIMEOUT + 10


def test_a_folder_that_one_node_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    elsewhere = [(f"--folder={tmp_path}",), (f"--folder={tmp_path / 'file'}",)]
    codes, (main, _), seconds = tasks(tmp_path, free_port(), arguments=elsewhere)
    assert codes == [1, 1], main
    assert f"FAIL n2           folder       {tmp_path / 'file'} cannot be written: Not a directory" in main
    assert seconds < 25


def test_folders_that_are_not_shared(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    elsewhere = [(f"--folder={tmp_path / name}",) for name in ("here", "there")]
    codes, (main, _), _ = tasks(tmp_path, free_port(), arguments=elsewhere)
    assert codes == [1, 1]
    assert "n2 does not see what n1 wrote: not a shared folder" in main


def test_a_node_with_another_version(tmp_path):
    older = tmp_path / "older" / "peft-0.1.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    path = os.pathsep.join([str(older.parent), os.environ.get("PYTHONPATH", "")])
    folder = tmp_path / "shared"
    folder.mkdir()
    codes, (main, _), seconds = tasks(folder, free_port(), changes=[{}, {"PYTHONPATH": path}], start=start_anew)
    assert codes == [1, 1], main
    assert "FAIL all          versions     n2 (task 1) has peft 0.1, n1 has" in main
    assert seconds < 25


def test_one_machine(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert cli.main(["doctor", "--quick", f"--folder={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    for check in ("versions", "gpus", "memory", "disk", "network", "extensions"):
        assert f" {check} " in printed
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").write_text("")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    assert cli.main(["doctor", "--quick", f"--folder={tmp_path}"]) == 1
    printed = capsys.readouterr().out
    assert "a build still runs or was killed" in printed
    assert "NCCL_SOCKET_IFNAME names nosuch0" in printed


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "SLURM_PROCID is None"),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "2"}, "SLURM_PROCID is '2'"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ],
)
def test_outside_of_srun(monkeypatch, capsys, variables, message):
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["doctor", "--distributed"]) == 2
    assert message in capsys.readouterr().err
