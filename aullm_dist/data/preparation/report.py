"""Renders the report of a preparation as plain text for a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from aullm_dist.facs import au_name

__all__ = ["render_report"]

_LISTED = 10
# A release whose clip count is this close to the published one is worth comparing AU by AU.
_CLOSE = 0.05


def render_report(report: Mapping[str, Any], *, listed: int = _LISTED) -> str:
    """Return the report as text: totals, clips per AU and per subject, then repairs, skips and what did not match.

    Args:
        report: What `prepare` returned, or a `report.json`.
        listed: How many entries of each list to write out; the rest is counted.
    """
    size = report["size"]
    lines = [
        f"{report['title']}: {report['num_clips']} clips, {report['num_frames']} frames, "
        f"{len(report['subjects'])} subjects, {size}x{size} pixels, crop {report['crop']}",
        f"  frames    {report['frames_root']}",
        f"  workbook  {report['workbook']['file']}",
        "",
        *_au_table(report),
        "",
        "clips per subject",
        *_columns([f"{name.split('/')[-1]} {count}" for name, count in report["subjects"].items()]),
    ]
    headings = {
        "repairs": "repaired",
        "skips": "skipped",
        "unmatched_errata": "published corrections not applied, to be inspected",
        "notes": "noted",
    }
    for key, heading in headings.items():
        entries = report[key]
        if not entries:
            continue
        lines += ["", f"{heading} ({len(entries)})"]
        lines += [f"  {entry['where']}: {entry['what']}" for entry in entries[:listed]]
        if len(entries) > listed:
            lines.append(f"  ... and {len(entries) - listed} more in report.json")
    return "\n".join(lines)


def _au_table(report: Mapping[str, Any]) -> list[str]:
    published = report["published"]
    expected = published["num_clips"]
    compare = expected and abs(report["num_clips"] - expected) <= _CLOSE * expected
    lines = [f"{'AU':<32}{'clips':>7}{'share':>8}" + (f"{'published':>11}" if compare else "")]
    numbers = {int(au) for au in report["aus"]} | ({int(au) for au in published["aus"]} if compare else set())
    for number in sorted(numbers):
        count = report["aus"].get(str(number), 0)
        line = f"{au_name(number):<32}{count:>7}{count / report['num_clips']:>8.1%}"
        if compare:
            line += f"{published['aus'].get(str(number), ''):>11}"
        lines.append(line)
    different = report.get("differences") if compare else None
    if different:
        lines += ["", f"not as published: {', '.join(different)}; add --explain for the clips that make the difference"]
    return lines


def _columns(entries: Sequence[str], *, width: int = 100) -> list[str]:
    cell = max(map(len, entries), default=0) + 3
    per_line = max(1, width // cell)
    return [
        "  " + "".join(f"{entry:<{cell}}" for entry in entries[start : start + per_line]).rstrip()
        for start in range(0, len(entries), per_line)
    ]
