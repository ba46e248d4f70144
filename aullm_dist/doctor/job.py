"""Checks the nodes of a job together: each reports to task 0, which compares, prints and sends the verdict back."""

import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aullm_dist.doctor.local import LLM_SECONDS, Finding, local_checks, nodes_of_job, run_program, this_node
from aullm_dist.doctor.rendezvous import (
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
from aullm_dist.versions import library_versions

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is checked: where runs are written, the longest wait of one check in seconds, how thoroughly, which LLM."""

    folder: Path
    timeout: float
    quick: bool
    prebuild: str
    llm: str = ""


def check_machine(options: Options) -> list[Finding]:
    """Check this machine alone."""
    return local_checks(
        options.folder, options.timeout, libraries=not options.quick, prebuild=options.prebuild, llm=options.llm
    )


def _extra(options: Options) -> float:
    """Return the seconds that checks may take which were asked for by name."""
    return (600.0 if options.prebuild else 0.0) + (LLM_SECONDS if options.llm else 0.0)


def check_job(options: Options, begun: float) -> int:
    """Check the nodes of a job, one task on each, and return the exit code.

    Raises:
        UserError: the tasks do not find each other, with the node that cannot and the reason.
    """
    place = place_of(os.environ, this_node(), nodes_of_job())
    return _main_task(options, place, begun) if place.rank == 0 else _other_task(options, place)


def _report(options: Options, place: Place, skew: float) -> tuple[dict[str, Any], str]:
    token, written = write_token(options.folder, place)
    findings = [*check_machine(options), written]
    gpus = next(finding.text for finding in findings if finding.check == "gpus")
    versions = library_versions()
    lines = [(finding.check, finding.level, finding.text) for finding in findings]
    return {
        "rank": place.rank, "node": place.node, "versions": versions, "gpus": gpus, "skew": skew, "token": token,
        "findings": lines,
    }, token  # fmt: skip


def _main_task(options: Options, place: Place, begun: float) -> int:
    with listen(place) as server:
        peers, findings = gather(server, place, options.timeout)
    report, token = _report(options, place, 0.0)
    # The others try as much as this task has, some of them on slower disks.
    theirs, silent = reports_of(peers, place, 3 * options.timeout + _extra(options))
    reports = {0: report} | theirs
    findings += silent
    peers = {rank: peer for rank, peer in peers.items() if rank in reports}
    for _, theirs in sorted(reports.items()):
        print_findings(theirs["node"], (Finding(*line) for line in theirs["findings"]))
        findings += [Finding(*line) for line in theirs["findings"] if line[1] == "FAIL"]
    compared = compare(reports)
    tokens = {theirs["node"]: theirs["token"] for theirs in reports.values()}
    answers = _second_round(options, place, peers, reports, tokens)
    together = [*_seen(answers, reports), *compared]
    if not any(finding.check == "rendezvous" for finding in findings):
        met = (
            f"{place.size} tasks met at {place.address}:{place.port}: {', '.join(r['node'] for r in reports.values())}"
        )
        together.insert(0, Finding("rendezvous", "ok", met))
    else:
        together = [*findings, *together]
    print_findings("all", together)
    remove_token(options.folder, token)
    code = print_verdict([*findings, *together], begun)
    for peer in peers.values():
        _tell(peer, code)
    return code


def _second_round(
    options: Options,
    place: Place,
    peers: Mapping[int, Peer],
    reports: Mapping[int, Mapping[str, Any]],
    tokens: Mapping[str, str],
) -> dict[int, dict[str, Any]]:
    """Have every task look for the others' files, and try a collective where all have come."""
    complete = len(peers) == place.size - 1
    for peer in peers.values():
        _tell(peer, {"tokens": tokens, "group": complete and not options.quick})
    answers = {0: _look(options, place, tokens, complete and not options.quick)}
    for rank, peer in peers.items():
        try:
            answers[rank] = peer.receive(time.monotonic() + options.timeout + 15.0)
        except (OSError, ValueError):
            answers[rank] = {"missing": [], "group": [1, f"{reports[rank]['node']} left in between"]}
    return answers


def _look(options: Options, place: Place, tokens: Mapping[str, str], group: bool) -> dict[str, Any]:
    missing = missing_tokens(options.folder, tokens)
    if not group:
        return {"missing": missing, "group": None}
    program = [sys.executable, "-c", _GROUP, str(options.timeout)]
    where = {"RANK": place.rank, "WORLD_SIZE": place.size, "MASTER_ADDR": place.address, "MASTER_PORT": place.port}
    told = {name: str(value) for name, value in where.items()}
    return {"missing": missing, "group": list(run_program(program, options.timeout + 10.0, **told))}


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


def _other_task(options: Options, place: Place) -> int:
    token = ""
    peer, skew = join(place, options.timeout)
    try:
        report, token = _report(options, place, skew)
        peer.send(report)
        deadline = time.monotonic() + 8 * options.timeout + _extra(options)
        order = peer.receive(deadline)
        peer.send(_look(options, place, order["tokens"], order["group"]))
        return int(peer.receive(deadline))
    except (OSError, ValueError) as error:
        raise UserError(f"{place.node}: task 0 left in between ({error}); its own lines say why") from error
    finally:
        remove_token(options.folder, token)


def _tell(peer: Peer, value: Any) -> None:
    try:
        peer.send(value)
    except OSError:
        return  # it has gone, which its missing answer will show


def print_findings(node: str, findings: Iterable[Finding]) -> None:
    """Print one line per finding, with the node that it is of."""
    who = f"{node:<12} " if node else ""
    for finding in findings:
        sys.stdout.write(f"{finding.level:<4} {who}{finding.check:<12} {finding.text}\n")
    sys.stdout.flush()


def print_verdict(findings: Iterable[Finding], begun: float) -> int:
    """Print how many checks failed and how long all took; return the exit code."""
    failed = sum(finding.level == "FAIL" for finding in findings)
    verdict = f"{failed} check{'' if failed == 1 else 's'} failed" if failed else "nothing stands in the way"
    sys.stdout.write(f"{verdict} ({time.monotonic() - begun:.1f} s)\n")
    sys.stdout.flush()
    return 1 if failed else 0
