"""Applies published corrections where the sheet is the one they were made for and the row shows the defect.

The field publishes corrections as row numbers of one version of a sheet. So a sheet must have that version's number of
rows, and each corrected cell must show its defect: no value, an order that cannot be, a frame that is not on disk while
the corrected one is, or alternatives in an AU cell. Everything else is reported and left alone.

`freeze` writes what was applied as (clip, column, found, value), which depends on no row number; `read_frozen` takes
such a file in place of the row numbers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from aullm_dist.data.annotations import has_alternatives, parse_aus
from aullm_dist.data.corpora.spec import (
    CorpusIndex,
    CorpusSpec,
    Correction,
    CorrectionState,
    Erratum,
    Note,
    Noter,
    RawClip,
)
from aullm_dist.data.listing import list_frames
from aullm_dist.errors import UserError
from aullm_dist.files import read_json, write_text

__all__ = ["apply_frozen", "apply_published", "fits_errata", "freeze", "read_frozen"]

_FRAMES = ("onset", "offset", "apex")
_COLUMNS = (*_FRAMES, "aus")


def fits_errata(spec: CorpusSpec, clips: Sequence[RawClip]) -> str | None:
    """Return None where row numbers of the published corrections hold for this sheet, else why they do not."""
    lacks_extra = _lacks_extra(spec, clips)
    expected = spec.errata_rows - lacks_extra
    if len(clips) != expected:
        other = f" or {spec.errata_rows - 1}" if spec.errata_extra_clip else ""
        return f"they were made for a sheet of {spec.errata_rows}{other} rows, this one has {len(clips)}"
    if spec.errata_extra_clip and not lacks_extra:
        row, name = spec.errata_extra_clip
        at = next((clip.row.index for clip in clips if clip.name.casefold() == name.casefold()), None)
        if at != row:
            return f"clip {name} is row {at} of the sheet (from 0), {row} in the one they were made for"
    return None


def _lacks_extra(spec: CorpusSpec, clips: Sequence[RawClip]) -> bool:
    if spec.errata_extra_clip is None:
        return False
    name = spec.errata_extra_clip[1].casefold()
    return all(clip.name.casefold() != name for clip in clips)


def apply_published(spec: CorpusSpec, clips: Sequence[RawClip], note: Noter, notes: list[Note]) -> list[Correction]:
    """Correct `clips` in place by row number and return what became of each correction."""
    if not spec.errata:
        return []
    misfit = fits_errata(spec, clips)
    if misfit:
        notes.append(Note("unmatched", spec.name, f"{len(spec.errata)} published corrections not applied: {misfit}"))
        return []
    by_index = {clip.row.index: clip for clip in clips}
    extra = spec.errata_extra_clip
    above = extra[0] if extra is not None and _lacks_extra(spec, clips) else None
    done: list[Correction] = []
    for erratum in spec.errata:
        row = erratum.row - 1 if above is not None and erratum.row > above else erratum.row
        clip = by_index.get(row)
        if clip is None:
            notes.append(Note("unmatched", spec.name, f"published correction of row {row}: the row is blank here"))
            continue
        done += _correct(clip, erratum, note)
    return done


def _correct(clip: RawClip, erratum: Erratum, note: Noter) -> list[Correction]:
    """Correct one row: first the cells whose defect shows in the row as it is, then the apex in the new interval."""
    wanted = _wanted(clip, erratum)
    found = {column: getattr(clip, column) for column in wanted}
    frames = list_frames_or_none(clip.folder)
    chosen: dict[str, Any] = {}  # numbers of frames, and the text of AUs
    for column in ("onset", "offset", "aus"):
        if column in wanted and found[column] != wanted[column] and _shows(clip, column, wanted, frames):
            chosen[column] = wanted[column]
    start, end = chosen.get("onset", clip.onset), chosen.get("offset", clip.offset)
    sound = _inside(clip.apex, clip.onset, clip.offset) and _inside(clip.apex, start, end)
    if "apex" in wanted and found["apex"] != wanted["apex"] and not sound:
        chosen["apex"] = wanted["apex"]
    if not _ordered(start, chosen.get("apex", clip.apex), end, apex_corrected="apex" in chosen):
        chosen = {column: value for column, value in chosen.items() if column == "aus"}
    corrections = []
    state: CorrectionState
    for column, value in wanted.items():
        if column in chosen:
            setattr(clip, column, value)
            shown = "missing" if found[column] is None else repr(found[column]) if column == "aus" else found[column]
            note("repaired", clip, f"{column} {shown}: set to {value} (published correction)")
            state = "applied"
        elif found[column] == value:
            note("noted", clip, f"{column} {value}: the published correction is in the sheet already")
            state = "already there"
        else:
            shown = "missing" if found[column] is None else repr(found[column])
            note(
                "unmatched",
                clip,
                f"published correction {column} -> {value} does not fit the row's {shown}: not applied",
            )
            state = "does not fit"
        corrections.append(Correction(clip.name, clip.row.number, column, _plain(found[column]), value, state))
    return corrections


def _wanted(clip: RawClip, erratum: Erratum) -> dict[str, int | str]:
    wanted = {column: getattr(erratum, column) for column in _COLUMNS if getattr(erratum, column) is not None}
    if erratum.length is not None and clip.onset is not None:
        wanted["offset"] = clip.onset + erratum.length - 1
    return wanted


def list_frames_or_none(folder: Path | None) -> Mapping[int, Path]:
    """List a clip's frames; a folder that is not there or that names one frame twice says nothing about a cell."""
    if folder is None:
        return {}
    try:
        return list_frames(folder)
    except UserError:
        return {}


def _shows(clip: RawClip, column: str, wanted: Mapping[str, int | str], frames: Mapping[int, Path]) -> bool:
    """Whether the cell has the defect that its correction is for."""
    value = wanted[column]
    if column == "aus":
        if not has_alternatives(clip.aus):
            return False
        try:
            return parse_aus(value).active <= parse_aus(clip.aus, alternatives="all").active
        except UserError:
            return False
    mine = getattr(clip, column)
    # The published apex stands in only where the row has none of its own; a sound row is never measured against it.
    apex = wanted.get("apex") if clip.apex is None else clip.apex
    if mine is None:
        return True
    if column == "onset":
        after = [number for number in (apex, clip.offset) if number is not None]
        if any(mine > number for number in after):
            return True
    else:
        before = [number for number in (apex, clip.onset) if number is not None]
        if any(mine < number for number in before):
            return True
        # The row bears the published apex, so it is the row that the offset was published for.
        if clip.apex is not None and clip.apex == wanted.get("apex") and mine > value:
            return True
    # A number that the sheet alone does not give away: its frame is not on disk, the corrected one is.
    return mine not in frames and value in frames


def _ordered(onset: Any, apex: Any, offset: Any, *, apex_corrected: bool) -> bool:
    """Whether the corrected row can be; an apex that nobody corrected may be wrong, it becomes the middle frame."""
    if onset is None or offset is None or onset > offset:
        return False
    return not apex_corrected or onset <= apex <= offset


def _inside(apex: int | None, onset: int | None, offset: int | None) -> bool:
    return apex is not None and (onset is None or onset <= apex) and (offset is None or apex <= offset)


def _plain(value: object) -> int | str | None:
    return value if value is None or isinstance(value, int | str) else str(value)


def freeze(index: CorpusIndex, path: Path) -> int:
    """Write the corrections that were applied to this sheet, by clip; returns their number.

    Raises:
        UserError: The file cannot be written.
    """
    applied = [asdict(item) for item in index.corrections if item.state == "applied"]
    left = [asdict(item) for item in index.corrections if item.state == "does not fit"]
    content = {
        "corpus": index.corpus,
        "workbook": {"name": index.table.file.name, "sha256": index.table.sha256(), "rows": len(index.table.rows)},
        "corrections": applied,
        "not_applied": left,
    }
    try:
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give a file in a writable folder") from error
    return len(applied)


def read_frozen(path: Path, corpus: str) -> list[Correction]:
    """Read what `freeze` wrote.

    Raises:
        UserError: The file is missing, is of another corpus, or an entry is malformed.
    """
    content = read_json(path, "write corrections with --freeze-errata")
    if not isinstance(content.get("corrections"), list):
        raise UserError(f"{path}: key corrections is missing; allowed: a file written with --freeze-errata")
    if content.get("corpus") != corpus:
        raise UserError(f"{path}: corrections of corpus {content.get('corpus')!r}; allowed here: {corpus}")
    return [_frozen_entry(path, number, entry) for number, entry in enumerate(content["corrections"])]


def _frozen_entry(path: Path, number: int, entry: object) -> Correction:
    where = f"{path}: corrections[{number}]"
    if not isinstance(entry, dict) or not isinstance(entry.get("clip"), str) or entry.get("column") not in _COLUMNS:
        raise UserError(f"{where}: {entry!r:.80}; allowed: clip, column ({', '.join(_COLUMNS)}), found and value")
    kind = str if entry["column"] == "aus" else int
    if type(entry.get("value")) is not kind or (kind is int and entry["value"] < 0):
        allowed = "text" if kind is str else "a frame number from 0 up"
        raise UserError(f"{where} ({entry['clip']}), value {entry.get('value')!r}; allowed: {allowed}")
    found = entry.get("found")
    if found is not None and not isinstance(found, int | str):
        raise UserError(f"{where} ({entry['clip']}), found {found!r:.80}; allowed: what the sheet has, or null")
    return Correction(entry["clip"], 0, entry["column"], found, entry["value"], "applied")


def apply_frozen(
    frozen: Sequence[Correction], clips: Sequence[RawClip], note: Noter, notes: list[Note], corpus: str
) -> list[Correction]:
    """Correct `clips` in place by their names; a cell that does not hold what the file found there is left alone."""
    by_name = {clip.name.casefold(): clip for clip in clips}
    done = []
    state: CorrectionState
    for item in frozen:
        clip = by_name.get(item.clip.casefold())
        if clip is None:
            notes.append(Note("unmatched", f"{corpus}/{item.clip}", "frozen correction: the sheet has no such clip"))
            continue
        now = _plain(getattr(clip, item.column))
        if now == item.found:
            setattr(clip, item.column, item.value)
            note("repaired", clip, f"{item.column} {now}: set to {item.value} (frozen correction)")
            state = "applied"
        elif now == item.value:
            note("noted", clip, f"{item.column} {now}: the frozen correction is in the sheet already")
            state = "already there"
        else:
            note(
                "unmatched", clip, f"frozen correction {item.column} {item.found} -> {item.value}: the sheet has {now}"
            )
            state = "does not fit"
        done.append(Correction(clip.name, clip.row.number, item.column, now, item.value, state))
    return done
