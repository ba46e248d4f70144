"""Connects the tasks of a job at a run's address and port, and reports who comes, with what, and what it can read.

Task 0 listens and the others report to it. No library is involved, so what fails here is the network, the variables or
the file system, and is named after the node.
"""

import json
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aullm_dist.doctor.local import Finding
from aullm_dist.errors import UserError

SKEW_SECONDS = 1.0
"""Clocks that differ by more make file times and logs of different nodes misleading."""


@dataclass(frozen=True, slots=True)
class Place:
    """This task among the others, and where they meet."""

    rank: int
    size: int
    node: str
    address: str
    port: int
    names: tuple[str, ...] = ()
    """The node of each task, as far as SLURM tells; else empty."""

    def name_of(self, rank: int) -> str:
        """Return how to call a task that has not said its own name."""
        return self.names[rank] if rank < len(self.names) else f"task {rank}"


class Peer:
    """A connection that sends and receives one JSON value per line, within a deadline."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.file = connection, connection.makefile("rb")

    def send(self, value: Any) -> None:
        """Send a value."""
        self.connection.sendall(json.dumps(value).encode() + b"\n")

    def receive(self, deadline: float) -> Any:
        """Return the next value.

        Raises:
            OSError: there was none in time, or the other has gone.
        """
        self.connection.settimeout(max(deadline - time.monotonic(), 0.01))
        line = self.file.readline()
        if not line:
            raise ConnectionResetError("it left in between")
        return json.loads(line)


def place_of(environment: Mapping[str, str], node: str, names: tuple[str, ...]) -> Place:
    """Return where this task stands, by the variables of srun or of torch's launcher.

    Raises:
        UserError: they are missing or contradict each other.
    """
    rank = environment.get("SLURM_PROCID", environment.get("RANK"))
    size = environment.get("SLURM_NTASKS", environment.get("WORLD_SIZE"))
    if rank is None or size is None or not (rank.isdigit() and size.isdigit()) or int(rank) >= int(size):
        raise UserError(
            f"SLURM_PROCID is {rank!r} and SLURM_NTASKS {size!r}; start the tasks with srun --ntasks-per-node=1"
        )
    address = environment.get("MASTER_ADDR") or (names[0] if names else "127.0.0.1")
    job = environment.get("SLURM_JOB_ID", "0")
    port = environment.get("MASTER_PORT") or str(20000 + (int(job) if job.isdigit() else 0) % 10000)
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT is {port!r}; allowed: 1 to 65535")
    tasks_are_nodes = len(names) == int(size)
    return Place(int(rank), int(size), node, address, int(port), names if tasks_are_nodes else ())


def write_token(folder: Path, place: Place) -> tuple[str, Finding]:
    """Write a small file of this task's; return its name and what came of it."""
    name = f".doctor-{place.rank}-{uuid.uuid4().hex[:8]}"
    try:
        (folder / name).write_text(place.node)
        return name, Finding("folder", "ok", f"{folder} can be written")
    except OSError as error:
        return "", Finding("folder", "FAIL", f"{folder} cannot be written: {error.strerror}")


def missing_tokens(folder: Path, tokens: Mapping[str, str], seconds: float = 5.0) -> list[str]:
    """Return whose files this task does not see; network file systems may show them late."""
    deadline = time.monotonic() + seconds
    while True:
        missing = [who for who, name in tokens.items() if name and not (folder / name).is_file()]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


def listen(place: Place) -> socket.socket:
    """Open the meeting place on task 0.

    Raises:
        UserError: the address is another machine's, or the port is taken.
    """
    try:
        family, _, _, _, where = socket.getaddrinfo(place.address, place.port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise UserError(f"{place.node}: MASTER_ADDR {place.address} cannot be resolved ({error.strerror})") from error
    server = socket.socket(family, socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(where)
    except OSError as error:
        server.close()
        reason = "is in use" if error.errno == 98 else f"cannot be opened ({error.strerror})"
        raise UserError(
            f"{place.node}: port {place.port} of {place.address} {reason}; MASTER_ADDR must be this node's and "
            "MASTER_PORT free"
        ) from error
    server.listen(place.size)
    return server


def gather(server: socket.socket, place: Place, timeout: float) -> tuple[dict[int, Peer], list[Finding]]:
    """Wait for all other tasks; return those that came, and a finding for each that did not."""
    peers: dict[int, Peer] = {}
    deadline = time.monotonic() + timeout
    while len(peers) < place.size - 1 and time.monotonic() < deadline:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            peer = Peer(server.accept()[0])
            rank = int(peer.receive(deadline))
            peer.send(time.time())
        except (OSError, ValueError):
            continue
        peers[rank] = peer
    absent = [
        Finding(
            "rendezvous", "FAIL", f"{place.name_of(rank)} (task {rank}) did not come to {place.address}:{place.port} "
            f"within {timeout:g} s; its own lines say why",
        )
        for rank in sorted(set(range(1, place.size)) - peers.keys())
    ]  # fmt: skip
    return peers, absent


def reports_of(peers: Mapping[int, Peer], place: Place, timeout: float) -> tuple[dict[int, dict], list[Finding]]:
    """Receive the report of each task that has come; return them, and a finding for each that does not report."""
    deadline = time.monotonic() + timeout
    reports: dict[int, dict] = {}
    silent = []
    for rank, peer in peers.items():
        try:
            reports[rank] = peer.receive(deadline)
        except (OSError, ValueError) as error:
            silent.append(
                Finding("report", "FAIL", f"{place.name_of(rank)} (task {rank}) came and fell silent: {error}")
            )
    return reports, silent


def join(place: Place, timeout: float) -> tuple[Peer, float]:
    """Connect to task 0; return the connection, and how far its clock is ahead in seconds.

    Raises:
        UserError: naming this node, the address and the reason.
    """
    deadline, reason = time.monotonic() + timeout, "nothing listens there"
    while time.monotonic() < deadline:
        try:
            left = max(deadline - time.monotonic(), 0.1)
            peer = Peer(socket.create_connection((place.address, place.port), timeout=min(left, 5.0)))
            peer.send(place.rank)
            # The answer was on its way for less than a millisecond; how long it was waited for says nothing.
            return peer, peer.receive(deadline) - time.time()
        except socket.gaierror as error:
            reason = f"the name cannot be resolved ({error.strerror})"
        except TimeoutError:
            reason = "no answer: a firewall, or another network"
        except (OSError, ValueError) as error:
            reason = str(getattr(error, "strerror", None) or error)
        time.sleep(0.2)
    raise UserError(
        f"{place.node}: task 0 was not reached at {place.address}:{place.port} within {timeout:g} s ({reason}); check "
        "MASTER_ADDR, MASTER_PORT and the network of this node"
    )


def compare(reports: Mapping[int, Mapping[str, Any]]) -> list[Finding]:
    """Compare what the tasks reported with task 0: versions, GPUs, clocks."""
    main = reports[0]
    findings = []
    for rank, report in sorted(reports.items()):
        who = f"{report['node']} (task {rank})"
        for name in sorted(main["versions"].keys() | report["versions"].keys()):
            mine, theirs = (r["versions"].get(name, "not installed") for r in (main, report))
            if mine != theirs:
                findings.append(Finding("versions", "FAIL", f"{who} has {name} {theirs}, {main['node']} has {mine}"))
        if report["gpus"] != main["gpus"]:
            findings.append(
                Finding("gpus", "FAIL", f"{who} has GPUs {report['gpus']}; {main['node']} has {main['gpus']}")
            )
        if abs(report["skew"]) > SKEW_SECONDS:
            findings.append(Finding("clocks", "FAIL", f"{who} is off by {report['skew']:+.1f} s"))
    if not any(finding.check == "versions" for finding in findings):
        findings.append(Finding("versions", "ok", f"the same on {len(reports)} tasks"))
    if not any(finding.check == "clocks" for finding in findings):
        skew = max(abs(report["skew"]) for report in reports.values())
        findings.append(Finding("clocks", "ok", f"within {skew:.3f} s"))
    return findings


def remove_token(folder: Path, name: str) -> None:
    """Remove this task's file."""
    if name:
        (folder / name).unlink(missing_ok=True)
