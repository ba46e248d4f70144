"""What the benchmarks share: the machine they ran on, medians, tables, ports and the launch line."""

import json
import os
import platform
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from aullm_dist.files import write_text

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
GIB = 2**30


def cpu_name() -> str | None:
    """Return the CPU's name, None where the system does not say."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def gpu_names() -> list[str]:
    """Return the names of the GPUs."""
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the installed versions; a package that is not there is left out."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the short hash of the checkout, with "-dirty" where it was changed."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie, interpolated; the only value for one."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> list[str]:
    """Return the lines of a Markdown table, its first `left` columns to the left and the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" * left + "|" + "---:|" * (len(head) - left)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def write_json(path: Path, report: object) -> None:
    """Write a report, all or nothing."""
    write_text(path, json.dumps(report, indent=1) + "\n")


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch_line(processes: int) -> list[str]:
    """Return what starts a script in `processes` processes, but for the script."""
    several = ["--multi_gpu", f"--main_process_port={free_port()}"] if processes > 1 else []
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--quiet", *several, f"--num_processes={processes}",
        "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
    ]  # fmt: skip
