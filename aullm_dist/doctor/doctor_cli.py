"""`aullm-dist doctor`: prints one line per check, worst last, and exits with 1 if anything failed."""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from aullm_dist.doctor.local import Finding, local_checks, nodes_of_job, run_program, this_node
from aullm_dist.doctor.meeting import (
    Peer,
    Place,
    compare,
    gather,
    join,
    listen,
    missing_tokens,
    place_of,
    remove_token,
    reports_of,
    write_token,
)
from aullm_dist.errors import UserError
from aullm_dist.training.manifest import library_versions

_GROUP = """
import datetime, os, sys, torch, torch.distributed as dist
on_gpu = torch.cuda.is_available()
if on_gpu:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(seconds=float(sys.argv[1])))
ones = torch.ones(1, device="cuda" if on_gpu else "cpu")
dist.all_reduce(ones)
assert ones.item() == dist.get_world_size(), ones
print(f"{dist.get_backend()} reduces over {dist.get_world_size()} processes")
sys.stdout.flush()
os._exit(0)
"""


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist doctor`."""
    parser.add_argument(
        "--distributed", action="store_true", help="under srun, one task per node: also check the nodes between them"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("."), metavar="DIR", help="where runs are written (default: this folder)"
    )
    parser.add_argument(
        "--timeout", type=float, default=20.0, metavar="SECONDS", help="longest wait of one check (default: 20)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out what imports torch: bitsandbytes, DeepSpeed, the collective"
    )
    parser.add_argument(
        "--prebuild",
        default="",
        metavar="OP[,OP]",
        help="compile DeepSpeed operations, cpu_adam for one, on every node",
    )


def run_doctor(args: argparse.Namespace) -> int:
    """Check, print, and return the exit code: 0, or 1 if a check failed.

    Args:
        args: `distributed`, `folder`, `timeout` in seconds, `quick`, `prebuild`.

    Raises:
        UserError: the tasks do not find each other, with the node that cannot and the reason.
    """
    begun = time.monotonic()
    if not args.distributed:
        findings = _local(args)
        versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
        _print("", [Finding("versions", "ok", versions), *findings])
        return _end(findings, begun)
    place = place_of(os.environ, this_node(), nodes_of_job())
    return _main_task(args, place, begun) if place.rank == 0 else _other_task(args, place)


def _local(args: argparse.Namespace) -> list[Finding]:
    return local_checks(args.folder, args.timeout, libraries=not args.quick, prebuild=args.prebuild)


def _report(args: argparse.Namespace, place: Place, skew: float) -> tuple[dict[str, Any], str]:
    token, written = write_token(args.folder, place)
    findings = [*_local(args), written]
    gpus = next(finding.text for finding in findings if finding.check == "gpus")
    versions = library_versions()
    lines = [(finding.check, finding.level, finding.text) for finding in findings]
    return {
        "rank": place.rank, "node": place.node, "versions": versions, "gpus": gpus, "skew": skew, "token": token,
        "findings": lines,
    }, token  # fmt: skip


def _main_task(args: argparse.Namespace, place: Place, begun: float) -> int:
    with listen(place) as server:
        peers, findings = gather(server, place, args.timeout)
    report, token = _report(args, place, 0.0)
    # The others try as much as this task has, some of them on slower disks.
    theirs, silent = reports_of(peers, place, 3 * args.timeout + (600.0 if args.prebuild else 0.0))
    reports = {0: report} | theirs
    findings += silent
    peers = {rank: peer for rank, peer in peers.items() if rank in reports}
    for _, theirs in sorted(reports.items()):
        _print(theirs["node"], (Finding(*line) for line in theirs["findings"]))
        findings += [Finding(*line) for line in theirs["findings"] if line[1] == "FAIL"]
    compared = compare(reports)
    tokens = {theirs["node"]: theirs["token"] for theirs in reports.values()}
    answers = _second_round(args, place, peers, reports, tokens)
    together = [*_seen(answers, reports), *compared]
    if not any(finding.check == "rendezvous" for finding in findings):
        met = (
            f"{place.size} tasks met at {place.address}:{place.port}: {', '.join(r['node'] for r in reports.values())}"
        )
        together.insert(0, Finding("rendezvous", "ok", met))
    else:
        together = [*findings, *together]
    _print("all", together)
    remove_token(args.folder, token)
    code = _end([*findings, *together], begun)
    for peer in peers.values():
        _tell(peer, code)
    return code


def _second_round(
    args: argparse.Namespace,
    place: Place,
    peers: Mapping[int, Peer],
    reports: Mapping[int, Mapping[str, Any]],
    tokens: Mapping[str, str],
) -> dict[int, dict[str, Any]]:
    """Have every task look for the others' files, and try a collective where all have come."""
    complete = len(peers) == place.size - 1
    for peer in peers.values():
        _tell(peer, {"tokens": tokens, "group": complete and not args.quick})
    answers = {0: _look(args, place, tokens, complete and not args.quick)}
    for rank, peer in peers.items():
        try:
            answers[rank] = peer.receive(time.monotonic() + args.timeout + 15.0)
        except (OSError, ValueError):
            answers[rank] = {"missing": [], "group": [1, f"{reports[rank]['node']} left in between"]}
    return answers


def _look(args: argparse.Namespace, place: Place, tokens: Mapping[str, str], group: bool) -> dict[str, Any]:
    missing = missing_tokens(args.folder, tokens)
    if not group:
        return {"missing": missing, "group": None}
    program = [sys.executable, "-c", _GROUP, str(args.timeout)]
    where = {"RANK": place.rank, "WORLD_SIZE": place.size, "MASTER_ADDR": place.address, "MASTER_PORT": place.port}
    told = {name: str(value) for name, value in where.items()}
    return {"missing": missing, "group": list(run_program(program, args.timeout + 10.0, **told))}


def _seen(answers: Mapping[int, Mapping[str, Any]], reports: Mapping[int, Mapping[str, Any]]) -> list[Finding]:
    findings = []
    for rank, answer in sorted(answers.items()):
        node = reports[rank]["node"]
        if answer["missing"]:
            others = ", ".join(answer["missing"])
            findings.append(Finding("folder", "FAIL", f"{node} does not see what {others} wrote: not a shared folder"))
        if answer["group"] is not None and answer["group"][0] != 0:
            findings.append(Finding("collective", "FAIL", f"{node}: {answer['group'][1]}"))
    if not any(finding.check == "folder" for finding in findings) and all(r["token"] for r in reports.values()):
        findings.append(Finding("folder", "ok", "every node reads what every other wrote"))
    if answers[0]["group"] is not None and not any(finding.check == "collective" for finding in findings):
        findings.append(Finding("collective", "ok", answers[0]["group"][1]))
    return findings


def _other_task(args: argparse.Namespace, place: Place) -> int:
    report, token = {}, ""
    peer, skew = join(place, args.timeout)
    try:
        report, token = _report(args, place, skew)
        peer.send(report)
        deadline = time.monotonic() + 8 * args.timeout + (600.0 if args.prebuild else 0.0)
        order = peer.receive(deadline)
        peer.send(_look(args, place, order["tokens"], order["group"]))
        return int(peer.receive(deadline))
    except (OSError, ValueError) as error:
        raise UserError(f"{place.node}: task 0 left in between ({error}); its own lines say why") from error
    finally:
        remove_token(args.folder, token)


def _tell(peer: Peer, value: Any) -> None:
    try:
        peer.send(value)
    except OSError:
        return  # it has gone, which its missing answer will show


def _print(node: str, findings: Iterable[Finding]) -> None:
    who = f"{node:<12} " if node else ""
    for finding in findings:
        sys.stdout.write(f"{finding.level:<4} {who}{finding.check:<12} {finding.text}\n")
    sys.stdout.flush()


def _end(findings: Iterable[Finding], begun: float) -> int:
    failed = sum(finding.level == "FAIL" for finding in findings)
    verdict = f"{failed} check{'' if failed == 1 else 's'} failed" if failed else "nothing stands in the way"
    sys.stdout.write(f"{verdict} ({time.monotonic() - begun:.1f} s)\n")
    sys.stdout.flush()
    return 1 if failed else 0
