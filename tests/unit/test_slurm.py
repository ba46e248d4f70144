"""What is read from SLURM's variables, who may train in a folder, and when a job is started again."""

import json
import subprocess
import sys

import pytest

from aullm_dist import cli
from aullm_dist.errors import UserError
from aullm_dist.runs import job as job_module
from aullm_dist.runs import lock as lock_module
from aullm_dist.runs.lock import RunLock, refuse_running
from aullm_dist.runtime import slurm

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NNODES": "2", "SLURM_NTASKS": "2", "SLURM_NODEID": "1"}
LAUNCHED = {**STEP, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1"}


def test_a_job_is_known_by_its_number_and_its_lives():
    assert slurm.job_of({}) is None
    assert slurm.job_of({"SLURM_JOB_ID": "7"}) == slurm.Job("7", 0)
    array = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3", "SLURM_RESTART_COUNT": "2"}
    assert slurm.job_of(array) == slurm.Job("7_3", 2)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        LAUNCHED,
        {"SLURM_JOB_ID": "7", "SLURM_NNODES": "x"},
        {**STEP, "SLURM_STEP_ID": "4294967290", "WORLD_SIZE": "2"},
    ],
    ids=["no job", "one task per node", "job script", "shell"],
)
def test_what_agrees_is_accepted(environment):
    slurm.refuse_step(environment)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SLURM_NODEID": None}, "SLURM_NODEID is not set"),
        ({"SLURM_NNODES": "two"}, "SLURM_NNODES is 'two'; allowed: a number"),
        ({"SLURM_NODEID": "2", "GROUP_RANK": "2"}, "SLURM_NODEID is 2 with SLURM_NNODES 2"),
        ({"SLURM_NTASKS": "8"}, "one task per node"),
        ({"GROUP_RANK": "0"}, "node rank 0 on node 1"),
        ({"LOCAL_WORLD_SIZE": "3"}, "2 nodes with 3 each make 6"),
        ({"WORLD_SIZE": None}, "srun started 2 tasks, but this process knows of no other"),
    ],
)
def test_what_contradicts_is_refused(changes, message):
    environment = {name: value for name, value in (LAUNCHED | changes).items() if value is not None}
    with pytest.raises(UserError, match=message):
        slurm.refuse_step(environment)


HOLD = """
import pathlib, sys
from aullm_dist.runs.lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
lock.take([0])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that trains fold 0."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_kept_out_until_the_first_is_gone(holder, tmp_path):
    with pytest.raises(UserError, match=rf"fold-00 is being trained by another run \(process {holder.pid} on"):
        refuse_running(tmp_path, 0)
    with pytest.raises(UserError, match="another run"):
        refuse_running(tmp_path, None)
    with pytest.raises(UserError, match="another run"):
        RunLock(tmp_path).take([0])
    refuse_running(tmp_path, 1)
    RunLock(tmp_path).take([1])
    holder.kill()
    holder.wait()
    refuse_running(tmp_path, 0)
    lock = RunLock(tmp_path)
    lock.take([0])
    lock.release()


def test_a_job_waits_for_its_own_former_life(holder, tmp_path, monkeypatch):
    (tmp_path / ".fold-00.lock").write_text(json.dumps({"pid": 1, "node": "n2", "job_id": "7"}))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    refuse_running(tmp_path, 0)
    monkeypatch.setattr(lock_module, "SAME_JOB_SECONDS", 0.0)
    with pytest.raises(UserError, match="on n2, job 7"):
        RunLock(tmp_path).take([0])


def decide(tmp_path, monkeypatch, capsys, *, status, signal="", stepped=False, failures=0, life=0, preempted=None):
    """Ask `aullm-dist requeue` about life 1 of job 7."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    job_module.write_record(tmp_path, job_module.JobRecord("7", life, stepped, failures))
    if preempted is not None:
        job_module.write_marker(tmp_path, slurm.Job("7", preempted))
    settings = ["demo", f"training.output={tmp_path}", "data.fold=null", "training.max_failures=2"]
    code = cli.main(["requeue", f"--status={status}", f"--signal={signal}", "--", *settings])
    return code, capsys.readouterr().out


@pytest.mark.parametrize(
    ("facts", "code", "why"),
    [
        ({"status": 0}, 3, "it is done"),
        ({"status": 1, "signal": "USR1", "preempted": 1}, 0, "asked to stop and saved"),
        ({"status": 0, "signal": "USR1", "preempted": 1}, 0, "asked to stop and saved"),
        ({"status": 0, "signal": "TERM", "preempted": 1}, 3, "cancelled"),
        ({"status": 1, "signal": "USR1", "preempted": 0, "life": 1}, 3, "has not completed a step"),
        ({"status": 2, "stepped": True, "life": 1}, 3, "a mistake in its input"),
        ({"status": 137, "stepped": True, "life": 0}, 3, "before it began to train"),
        ({"status": 137, "stepped": False, "life": 1}, 3, "has not completed a step"),
        ({"status": 137, "stepped": True, "life": 1}, 0, "1 of 2 allowed failures"),
        ({"status": 137, "stepped": True, "life": 1, "failures": 2}, 3, "2 failures are allowed"),
    ],
)
def test_when_a_job_goes_round_again(tmp_path, monkeypatch, capsys, facts, code, why):
    found, printed = decide(tmp_path, monkeypatch, capsys, **facts)
    assert found == code
    assert why in printed
    assert printed.startswith("Job 7: starting again" if code == 0 else "Job 7: not started again")
    expected = facts.get("failures", 0) + ("allowed failures" in why)
    assert job_module.read_record(tmp_path).failures == expected


def test_requeue_is_for_jobs(monkeypatch, capsys):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert cli.main(["requeue", "--status=1", "demo"]) == 2
    assert "SLURM_JOB_ID is not set" in capsys.readouterr().err


def test_a_new_life_clears_the_marker_and_keeps_the_failures(tmp_path):
    job_module.write_marker(tmp_path, slurm.Job("7", 0), step=3)
    job_module.write_record(tmp_path, job_module.JobRecord("7", 0, True, 2))
    assert job_module.is_preempted(tmp_path, slurm.Job("7", 0))
    assert not job_module.is_preempted(tmp_path, slurm.Job("7", 1))
    assert job_module.begin_job(tmp_path, slurm.Job("7", 1)) == job_module.JobRecord("7", 1, False, 2)
    assert not (tmp_path / job_module.MARKER).exists()
    assert job_module.begin_job(tmp_path, slurm.Job("8", 0)).failures == 0
