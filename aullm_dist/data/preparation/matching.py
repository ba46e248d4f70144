"""Matches annotated clips with the frame files that exist: what is complete, kept, or left out, and why."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from aullm_dist.data.corpora import ClipRecord, CorpusIndex, Note, get_corpus
from aullm_dist.data.listing import FrameFolder, gaps, list_folder, ranges
from aullm_dist.data.preparation.shards import MIN_FRAMES, BadClips, ClipPlan
from aullm_dist.errors import UserError, file_errors

__all__ = ["plan_clips"]


def plan_clips(index: CorpusIndex, bad_clips: BadClips) -> tuple[list[ClipPlan], list[Note]]:
    """Match every clip with its frame files; clips with defects are treated as `bad_clips` says.

    Raises:
        UserError: A clip has a defect, under "stop".
    """
    with file_errors(str(index.frames_root)):
        return _plan_clips(index, bad_clips)


def _plan_clips(index: CorpusIndex, bad_clips: BadClips) -> tuple[list[ClipPlan], list[Note]]:
    plans: list[ClipPlan] = []
    notes: list[Note] = []
    defects: list[Note] = []
    drops_frames = get_corpus(index.corpus).drops_frames
    for record in index.records:
        plan, defect = _match_frames(record, index.frames_root, notes)
        usable = plan is not None and len(plan.names) >= MIN_FRAMES
        if defect and usable and (bad_clips == "repair" or drops_frames):
            assert plan is not None
            note = Note("repaired", record.sample_id, f"{defect}: kept with the {len(plan.names)} that exist")
            plans.append(plan)
        elif defect:
            note = Note("skipped", record.sample_id, defect)
        else:
            assert plan is not None, "a record without a plan has a defect"
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


def _match_frames(record: ClipRecord, frames_root: Path, notes: list[Note]) -> tuple[ClipPlan | None, str]:
    """Return the plan of a clip with the frames that exist, and its defect or an empty text."""
    if record.folder is None:
        return None, f"no clip folder {'/'.join(record.sample_id.split('/')[1:])} in {frames_root}"
    try:
        listed = list_folder(record.folder)
    except UserError as error:
        return None, str(error)
    left_out = listed.left_out()
    if left_out:
        notes.append(Note("noted", record.sample_id, left_out))
    frames = {number: path for number, path in listed.frames.items() if record.onset <= number <= record.offset}
    labels = asdict(record)
    del labels["folder"]
    names = tuple(path.name for path in frames.values())
    plan = ClipPlan({**labels, "aus": list(record.aus)}, tuple(frames), record.folder, names)
    missing = gaps(tuple(frames), record.onset, record.offset)
    span = f"{record.onset}..{record.offset}"
    if missing:
        where = _nearest(record, frames) if frames else _instead(listed)
        return plan, f"{record.folder}: frames {ranges(missing)} of {span} are missing{where}"
    if len(frames) < MIN_FRAMES:
        return plan, f"{record.folder}: {len(frames)} frame in {span}; allowed: {MIN_FRAMES} or more"
    return plan, ""


def _instead(listed: FrameFolder) -> str:
    found = listed.instead()
    return f" ({found})" if found else ""


def _nearest(record: ClipRecord, frames: Mapping[int, Path]) -> str:
    """Say which existing frame is nearest to a missing onset, apex or offset."""
    labels = {"onset": record.onset, "apex": record.apex, "offset": record.offset}
    gone = [
        f"{name} {number} -> nearest existing {min(frames, key=lambda have: abs(have - number))}"
        for name, number in labels.items()
        if number not in frames
    ]
    return f" ({', '.join(gone)})" if gone else ""
