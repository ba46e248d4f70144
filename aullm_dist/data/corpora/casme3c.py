"""CAS(ME)^3, part C: AUs separated by commas, one of them a Chinese one; no apex column, so the middle frame stands in.

No public source that we read shows the folders of part C or its frame rate. Clips are looked for as
`<subject>/<count>/<frames>`, with a folder `color` below or without **(ours)**; the frame rate is left open.
"""

import re

from aullm_dist.data.corpora.spec import Columns, CorpusSpec

__all__ = ["SPEC"]


def _subject_of(subject: str, _clip: str) -> str | None:
    match = re.fullmatch(r"0*([0-9]{1,3})", subject)
    return match[1].zfill(2) if match else None


SPEC = CorpusSpec(
    name="casme3c",
    title="CAS(ME)^3 part C",
    fps=None,
    columns=Columns(
        subject="sub",
        clip="count",
        onset="onset",
        apex=(),
        offset="offset",
        aus="au",
        emotion=(),
    ),
    frame_folders=("part_C",),
    clip_folders=("{subject}/{clip}", "{subject}/{clip}/color"),
    key="{subject}/{clip}_{onset}",
    subject_of=_subject_of,
    subject_form="a subject's number such as 1",
    drops_frames=True,
)
