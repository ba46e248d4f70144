"""Annotated clips and the frame files that exist for them: what is complete, what is kept, what is left out and why."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from aullm_dist.data.corpora import ClipRecord, CorpusIndex, Note, get_corpus
from aullm_dist.data.corpora.layout import list_frames
from aullm_dist.data.shards import MIN_FRAMES, BadClips, ClipPlan
from aullm_dist.errors import UserError

__all__ = ["plan_clips"]


def plan_clips(index: CorpusIndex, bad_clips: BadClips) -> tuple[list[ClipPlan], list[Note]]:
    """Match every clip with its frame files; clips with defects are treated as `bad_clips` says.

    Raises:
        UserError: A clip has a defect, under "stop".
    """
    plans: list[ClipPlan] = []
    notes: list[Note] = []
    defects: list[Note] = []
    drops_frames = get_corpus(index.corpus).drops_frames
    for record in index.records:
        plan, defect = _match_frames(record, index.frames_root)
        usable = plan is not None and len(plan.names) >= MIN_FRAMES
        if defect and usable and (bad_clips == "repair" or drops_frames):
            assert plan is not None
            note = Note("repaired", record.sample_id, f"{defect}: kept with the {len(plan.names)} that exist")
            plans.append(plan)
        elif defect:
            note = Note("skipped", record.sample_id, defect)
        else:
            plans.append(plan)
            continue
        notes.append(note)
        if not (usable and drops_frames):
            defects.append(note)
    if bad_clips == "stop" and defects:
        more = f" (and {len(defects) - 1} more clips with defects)" if len(defects) > 1 else ""
        raise UserError(f"{defects[0]}{more}; complete the release, or use --bad-clips repair|skip")
    notes += _numbering_note(index.corpus, plans)
    return plans, notes


def _numbering_note(corpus: str, plans: Sequence[ClipPlan]) -> list[Note]:
    """Tell of a release that pads some frame numbers and not others; sorted by name they would be out of order."""
    padded = 0
    widths = set()
    for plan in plans:
        digits = re.findall(r"[0-9]+", Path(plan.names[0]).stem)[-1]
        if digits.startswith("0"):
            padded += 1
            widths.add(len(digits))
    if padded in (0, len(plans)) and len(widths) < 2:
        return []
    text = (
        f"first frames are zero-padded in {padded} of {len(plans)} clips, to widths {sorted(widths)}: matched by number"
    )
    return [Note("noted", corpus, text)]


def _match_frames(record: ClipRecord, frames_root: Path) -> tuple[ClipPlan | None, str]:
    """Return the plan of a clip with the frames that exist, and its defect or an empty text."""
    if record.folder is None:
        return None, f"no clip folder {'/'.join(record.sample_id.split('/')[1:])} in {frames_root}"
    try:
        listed = list_frames(record.folder)
    except UserError as error:
        return None, str(error)
    frames = {number: path for number, path in listed.items() if record.onset <= number <= record.offset}
    labels = asdict(record)
    del labels["folder"]
    names = tuple(path.name for path in frames.values())
    plan = ClipPlan({**labels, "aus": list(record.aus)}, tuple(frames), record.folder, names)
    missing = [number for number in range(record.onset, record.offset + 1) if number not in frames]
    span = f"{record.onset}..{record.offset}"
    if missing:
        return plan, f"{record.folder}: frames {_ranges(missing)} of {span} are missing{_nearest(record, frames)}"
    if len(frames) < MIN_FRAMES:
        return plan, f"{record.folder}: {len(frames)} frame in {span}; allowed: {MIN_FRAMES} or more"
    return plan, ""


def _nearest(record: ClipRecord, frames: Mapping[int, Path]) -> str:
    """Say which existing frame is nearest to a missing onset, apex or offset."""
    if not frames:
        return ""
    labels = {"onset": record.onset, "apex": record.apex, "offset": record.offset}
    gone = [
        f"{name} {number} -> nearest existing {min(frames, key=lambda have: abs(have - number))}"
        for name, number in labels.items()
        if number not in frames
    ]
    return f" ({', '.join(gone)})" if gone else ""


def _ranges(numbers: Sequence[int]) -> str:
    """Write ascending numbers as `3, 5-9`, at most four ranges of them."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return ", ".join(texts if len(texts) <= 4 else [*texts[:4], "..."])
