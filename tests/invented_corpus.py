"""A corpus that does not exist, in one module, as a package of a user would bring it: nothing else knows of it."""

import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from aullm_dist.data.corpora import Columns, CorpusSpec, Provenance, SyntheticFacts
from aullm_dist.data.corpora.drawn import Cell, ClipPlan, Layout, Look, Placed

HEADER = ["Person", "Take", "From", "Peak", "To", "Units", "Feeling"]
ROWS = [
    ["p1", "t1", 3, 5, 7, "1+2", "surprise"],
    ["p1", "t2", 3, 4, 6, "4", "anger"],
    ["p2", "t1", 11, 12, 14, "12|4", "others"],
    ["p3", "t1", 1, 2, 4, "1", "surprise"],
    ["p3", "t2", 1, 3, 4, "12", "happiness"],
]


def _person_of(person: str, _take: str) -> str | None:
    return person if re.fullmatch("p[0-9]+", person) else None


def _harness_text(text: str) -> str:
    return text.replace("|", "+")


def _layout(clips: Sequence[ClipPlan], _context_frames: int) -> Layout:
    placed = []
    for plan in clips:
        person, take = f"p{plan.subject + 1}", f"t{plan.ordinal + 1}"
        units: Cell = " ".join(str(au) for au in plan.active_aus)
        row: list[Cell] = [person, take, plan.onset, plan.apex, plan.offset, units, plan.emotion]
        placed.append(Placed(plan, f"takes/{person}-{take}", "still{:04d}.png", row))
    return Layout("takes.xlsx", "all", [], list(HEADER), placed)


SPEC = CorpusSpec(
    name="invented",
    title="The Invented Corpus",
    provenance=Provenance("the University of Nowhere", "who publish it under CC BY 4.0"),
    fps=50.0,
    aus=(1, 4, 12),
    columns=Columns(
        subject="Person", clip="Take", onset="From", apex="Peak", offset="To", aus="Units", emotion="Feeling"
    ),
    frame_folders=("takes",),
    clip_folders=("{subject}-{clip}",),
    subject_of=_person_of,
    subject_form="a person such as p1",
    published_clips=5,
    published_aus={1: 2, 4: 2, 12: 3},
    harness_text=_harness_text,
    synthetic=SyntheticFacts(
        frame_size=(40, 32),
        clip_lengths=(5, 6),
        combinations={(1,): 2, (4,): 1, (12,): 1, (1, 4): 1},
        layout=_layout,
        look=Look(gamma=0.9),
        colour=False,
        first_numbers=None,
    ),
)


def write_release(root: Path) -> Path:
    """Write `takes/p1-t1/still0003.png` and so on, and a CSV sheet whose third row separates AUs by `|`."""
    root.mkdir(parents=True)
    lines = [",".join(map(str, row)) for row in (HEADER, *ROWS)]
    (root / "takes.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for person, take, first, _, last, *_ in ROWS:
        folder = root / "takes" / f"{person}-{take}"
        folder.mkdir(parents=True)
        for number in range(first, last + 1):
            Image.new("L", (20, 16), 10 * number).save(folder / f"still{number:04d}.png")
    return root
