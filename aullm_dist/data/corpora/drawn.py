"""Describes the synthetic twin of a corpus, and the parts that its layout function puts together.

A generator for tests and demos: no claim about real faces is made from it. The layouts follow the public loaders of the
corpora; no file of a real corpus was opened for them. Plain data without numpy: `aullm_dist.data.synthetic` draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from aullm_dist.errors import UserError

__all__ = [
    "DRAWN_AUS",
    "NOTICE",
    "OBJECTIVE_CLASSES",
    "SIDE_LETTERS",
    "AuCombination",
    "Cell",
    "ClipPlan",
    "Layout",
    "LayoutOf",
    "Look",
    "Movement",
    "Placed",
    "Side",
    "SyntheticFacts",
    "plain_aus",
    "plus_joined",
]

NOTICE = "Synthetic corpus for tests and demos. No claim about real faces is made from it."
SIDE_LETTERS = {"left": "L", "right": "R", "both": ""}
OBJECTIVE_CLASSES = {"happiness": 1, "surprise": 2, "anger": 3, "disgust": 4, "sadness": 5, "fear": 6}
"""Numbers that sheets give to the emotions; 7 stands for any other."""
DRAWN_AUS = frozenset({1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17, 20, 24, 25, 43, 45})
"""AUs that `aullm_dist.data.synthetic.faces` can move."""

Side = Literal["both", "left", "right"]
AuCombination = tuple[int, ...]
Cell = str | int | float | None


@dataclass(frozen=True, slots=True)
class Movement:
    """One AU in one clip; `lag` shifts its peak from the apex, as a fraction of the clip; `static` AUs do not move."""

    au: int
    side: Side
    strength: float
    lag: float
    static: bool = False


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """Everything about a clip but its pixels. Frame numbers are file frame numbers, both ends inclusive."""

    index: int
    subject: int
    ordinal: int
    movements: tuple[Movement, ...]
    onset: int
    apex: int
    offset: int
    residual: float
    emotion: str
    apex_missing: bool

    @property
    def active_aus(self) -> tuple[int, ...]:
        """Sorted AUs that move during the clip: the clip's label."""
        return tuple(sorted(m.au for m in self.movements if not m.static))

    @property
    def num_frames(self) -> int:
        """Frames from onset to offset."""
        return self.offset - self.onset + 1


@dataclass(frozen=True, slots=True)
class Placed:
    """A clip with its place on disk, its workbook row and the way its frames are named."""

    plan: ClipPlan
    folder: str
    file_name: str
    row: list[Cell]
    dropped: frozenset[int] = frozenset()
    """Frame numbers that were lost in recording."""
    depth_folder: str | None = None
    """Folder of a depth frame, apart from the colour frames."""
    again: list[Cell] = field(default_factory=list)
    """A second row of the clip, filled by damage alone."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A corpus on disk: workbook name, sheet, the rows above the table, the table's header, the clips."""

    workbook: str
    sheet: str
    rows_above: list[list[Cell]]
    header: list[Cell]
    clips: list[Placed]


@dataclass(frozen=True, slots=True)
class Look:
    """A camera: exponent of the gray curve, optical blur (pixels), factor on the sensor noise."""

    gamma: float = 1.0
    blur_pixels: float = 0.0
    noise_factor: float = 1.0
    vignette_banding: bool = False


LayoutOf = Callable[[Sequence[ClipPlan], int], Layout]
"""Lays out planned clips; the number is of the frames written before onset and after offset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticFacts:
    """How a synthetic corpus in the layout of a real one is drawn and written.

    Raises:
        UserError: a combination has an AU that cannot be drawn.
    """

    frame_size: tuple[int, int]
    """(height, width) in pixels, in the proportions of the real pictures, scaled down."""
    clip_lengths: tuple[int, int]
    """Fewest and most frames from onset to offset, around the mean length of the real clips."""
    combinations: Mapping[AuCombination, float]
    """Weight of each AU combination, chosen so that AU counts come out near the published ones; the order is part of
    the random draws. Each AU of the corpus's set must be in one."""
    layout: LayoutOf
    look: Look = Look()
    """Its domain shift."""
    colour: bool = True
    """Whether frames have three channels."""
    first_numbers: tuple[int, int] | None = (1, 900)
    """Range that the count of a video's frames starts from, the end excluded; None counts each clip from 1."""
    one_count: bool = False
    """Whether one count continues through all clips of a subject."""
    static_aus: bool = False
    """Whether some clips have an AU that is held and does not move, which is no label."""
    stream: int | None = None
    """Key of the random streams; None derives one from the corpus's name."""

    def __post_init__(self) -> None:
        unknown = sorted({au for combination in self.combinations for au in combination} - DRAWN_AUS)
        if unknown:
            allowed = ", ".join(map(str, sorted(DRAWN_AUS)))
            raise UserError(
                f"synthetic facts: combinations hold AU{unknown[0]}, which is not drawn; allowed: {allowed}"
            )


def plus_joined(plan: ClipPlan) -> str:
    """Return the AUs of a clip joined by plus signs, the side's letter before the number: `L4+7`."""
    return "+".join(f"{SIDE_LETTERS[m.side]}{m.au}" for m in plan.movements)


def plain_aus(plan: ClipPlan) -> Cell:
    """Return `plus_joined` as a cell: a lone number becomes a number, as spreadsheets make of it."""
    text = plus_joined(plan)
    return int(text) if text.isdigit() else text
