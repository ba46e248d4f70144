"""A SLURM cluster of two nodes on this host: munged, slurmctld and two slurmd as ordinary processes in one folder."""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from training_runs import ROOT, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
_CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/none
KillWait=20
MinJobAge=600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:2
"""


def missing() -> list[str]:
    """Return the programs of SLURM and munge that this machine lacks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [program for program in PROGRAMS if shutil.which(program, path=path) is None]


@dataclass
class Cluster:
    """A running cluster; `stop` ends exactly the processes that `start` began."""

    folder: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen] = field(default_factory=list)

    @classmethod
    def start(cls, folder: Path) -> "Cluster":
        """Start a cluster below an empty folder whose path is short, as the socket of munge must be."""
        for name in ("state", "spool/n1", "spool/n2"):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        (folder / "slurm.conf").write_text(
            _CONFIGURATION.format(
                host=socket.gethostname().split(".")[0],
                user="root" if os.getuid() == 0 else os.environ["USER"],
                folder=folder,
                controller=free_port(),
                first=free_port(),
                second=free_port(),
            )
        )
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        # The tree that is tested, its command line and its interpreter, as an installed environment would give them.
        commands = folder / "bin"
        commands.mkdir()
        site = folder / "site.sh"
        site.write_text("export MASTER_ADDR=127.0.0.1  # n1 and n2 are no names of hosts\n")
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{commands}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
            "AULLM_SITE": str(site),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        cluster = cls(folder, environment)
        try:
            cluster._start_processes(key)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def _start_processes(self, key: Path) -> None:
        import sys

        for name, module in (("torchrun", "torch.distributed.run"), ("aullm-dist", "aullm_dist.cli")):
            path = self.folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
            path.chmod(0o755)
        folder = self.folder
        self._spawn(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed",
            "--num-threads=2",
        )  # fmt: skip
        wait_for(lambda: (folder / "munge.socket").exists(), 15, "munged to open its socket")
        self._spawn("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._spawn("slurmd", "-D", "-N", node)
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%T %D").strip() == "idle 2", 40, "two idle nodes")

    def _spawn(self, *command: str) -> None:
        # A session of its own: an interrupted test run ends with `stop`, not with a signal to everything.
        self.processes.append(
            subprocess.Popen(
                command,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd=self.folder,
            )  # fmt: skip
        )

    def stop(self) -> None:
        """End all jobs, then the processes that were started here."""
        if len(self.processes) > 1:
            self.run("scancel", "--user=root" if os.getuid() == 0 else f"--user={os.environ['USER']}")
            self.run("scancel", "--signal=KILL", "--full", *self.run("squeue", "-h", "-o", "%A").split())
            deadline = time.monotonic() + 20
            while self.run("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.5)
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes = []

    def run(self, *command: str, cwd: Path | None = None, more: dict[str, str] | None = None) -> str:
        """Run a command of SLURM's and return what it prints, errors included."""
        done = subprocess.run(
            command, env={**self.environment, **(more or {})}, capture_output=True, text=True, timeout=120, cwd=cwd,
            check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    def submit(self, *arguments: str, more: dict[str, str] | None = None) -> str:
        """sbatch from the root of the repository; return the job's number."""
        printed = self.run("sbatch", "--parsable", *arguments, cwd=ROOT, more=more).strip()
        assert printed.splitlines()[-1].split(";")[0].isdigit(), printed
        return printed.splitlines()[-1].split(";")[0]

    def state(self, job: str) -> str:
        """Return SLURM's word for a job, of an array for all of its tasks."""
        shown = self.run("scontrol", "show", "job", job)
        return " ".join(word.split("=")[1] for word in shown.split() if word.startswith("JobState="))

    def value(self, job: str, key: str) -> str:
        """Return one entry of `scontrol show job`."""
        return next(
            word.partition("=")[2]
            for word in self.run("scontrol", "show", "job", job).split()
            if word.startswith(f"{key}=")
        )

    def start_soon(self, job: str, seconds: int = 3) -> None:
        """Let a requeued job begin before the two minutes for which SLURM holds it are over.

        There is a reason for them. A node refuses a job in the second in which it was requeued; and behind a step that
        was killed SLURM repeats its order to end the job's processes after a minute, which the next life must not meet.
        """
        self.run("scontrol", "update", f"JobId={job}", f"StartTime=now+{seconds}")


def wait_for(ready: Callable[[], object], seconds: float, what: str) -> None:
    """Wait until something is so, or fail naming it."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s for {what}")
        time.sleep(0.25)
