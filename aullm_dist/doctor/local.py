"""Checks one machine; every check is bounded in time."""

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aullm_dist.runtime.slurm import node_of

Level = Literal["ok", "note", "FAIL"]
FREE_GIB = 5.0
"""A run folder needs room for checkpoints: tens of MB for a small LLM, several GB for the LoRA of a large one."""
_BITSANDBYTES = """
import contextlib, io, torch
with contextlib.redirect_stdout(io.StringIO()):
    import bitsandbytes as bnb
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(64, 64, device=device)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    error = (bnb.functional.dequantize_4bit(packed, state) - weight).abs().mean().item()
print(f"packs and unpacks NF4 on {device}, mean error {error:.3f}")
"""
_DEEPSPEED = """
import contextlib, io, os
with contextlib.redirect_stdout(io.StringIO()):
    import deepspeed
    from deepspeed.ops.op_builder.all_ops import ALL_OPS
    built = []
    for name in filter(None, os.environ.get("AULLM_PREBUILD", "").split(",")):
        ALL_OPS[name].load()
        built.append(name)
print("built " + ", ".join(built) if built else "imports; the engines need none of its compiled operations")
"""
_LLM = """
import os, sys
from aullm_dist.errors import UserError
from aullm_dist.planning.packed_share import describe_share
try:
    print(describe_share(os.environ["AULLM_DOCTOR_LLM"]))
except UserError as error:
    sys.exit(str(error))
"""
LLM_SECONDS = 180.0
"""It imports torch and the library of models, which shared disks and busy machines make slow."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one check."""

    check: str
    level: Level
    text: str


def this_node() -> str:
    """Return the name under which this machine is reported: SLURM's, or the host's."""
    return node_of(os.environ) or socket.gethostname()


def local_checks(folder: Path, timeout: float, *, libraries: bool, prebuild: str, llm: str = "") -> list[Finding]:
    """Run the checks of this machine.

    Args:
        folder: where runs will be written.
        timeout: seconds for each check that starts a program.
        libraries: whether to try bitsandbytes and DeepSpeed, which takes some seconds each.
        prebuild: names of DeepSpeed operations to compile, separated by commas.
        llm: folder or name of an LLM; empty for none.
    """
    findings = [_gpus(timeout), _memory(), _disk(folder), *_interfaces(), _stale_lock()]
    if libraries:
        findings.append(_program("bitsandbytes", _BITSANDBYTES, timeout))
        # A compiler needs minutes, and was asked for.
        findings.append(_program("deepspeed", _DEEPSPEED, 600.0 if prebuild else timeout, AULLM_PREBUILD=prebuild))
    if llm:
        findings.append(_program("llm", _LLM, max(timeout, LLM_SECONDS), AULLM_DOCTOR_LLM=llm))
    return findings


def _gpus(timeout: float) -> Finding:
    if shutil.which("nvidia-smi") is None:
        return Finding("gpus", "note", "none (no nvidia-smi)")
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    code, text = run_program(query, timeout)
    if code != 0:
        return Finding("gpus", "FAIL", f"nvidia-smi: {text}")
    names = text.splitlines()
    return Finding("gpus", "ok" if names else "note", f"{len(names)}: {'; '.join(sorted(set(names)))}")


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return Finding("memory", "ok", f"{memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free")


def _disk(folder: Path) -> Finding:
    try:
        if not folder.is_dir() and folder.exists():
            return Finding("disk", "FAIL", f"{folder}: is no folder")
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        return Finding("disk", "FAIL", f"{folder}: {error.strerror}")
    return Finding(
        "disk", "ok" if free >= FREE_GIB else "FAIL", f"{free:.1f} GiB free in {folder} (needed: {FREE_GIB:g})"
    )


def _interfaces() -> list[Finding]:
    import psutil

    there = {
        name: [address.address for address in addresses if address.family == socket.AF_INET]
        for name, addresses in psutil.net_if_addrs().items()
    }
    findings = [Finding("network", "ok", ", ".join(f"{n} {a[0]}" for n, a in sorted(there.items()) if a))]
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        # NCCL also takes prefixes, a leading "=" for exact names and "^" for those to leave out.
        given = os.environ.get(variable, "")
        for wanted in filter(None, given.removeprefix("=").split(",")) if not given.startswith("^") else ():
            if not any(name.startswith(wanted) for name in there):
                allowed = ", ".join(sorted(there))
                findings.append(Finding("network", "FAIL", f"{variable} names {wanted}; this node has {allowed}"))
    return findings


def _stale_lock() -> Finding:
    """A killed build leaves a lock behind that the next one waits for without end."""
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    locks = sorted(root.glob("**/lock")) if root.is_dir() else []
    if locks:
        return Finding("extensions", "FAIL", f"{locks[0]}: a build still runs or was killed; remove it if none is")
    return Finding("extensions", "ok", f"no build left a lock in {root}")


def _program(check: str, code: str, timeout: float, **more: str) -> Finding:
    status, text = run_program([sys.executable, "-c", code], timeout, **more)
    return Finding(check, "ok" if status == 0 else "FAIL", text)


def run_program(command: list[str], timeout: float, **more: str) -> tuple[int, str]:
    """Return exit code and last line of a program; its errors where it failed."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **more}, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, f"no answer within {timeout:g} s"
    except OSError as error:
        return -1, str(error)
    text = (done.stdout if done.returncode == 0 else done.stderr or done.stdout).strip()
    lines = text.splitlines() or [f"exit code {done.returncode}"]
    return done.returncode, text if done.returncode == 0 else lines[-1]


def nodes_of_job() -> tuple[str, ...]:
    """Return the nodes of this job in the order of their tasks, empty where SLURM does not tell."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return ()
    code, text = run_program(["scontrol", "show", "hostnames", nodes], 10.0)
    return tuple(text.split()) if code == 0 else ()
