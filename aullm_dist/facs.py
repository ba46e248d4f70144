"""Lists facts of the Facial Action Coding System (FACS) that data, model and evaluation share.

Names and muscles follow FACS; the prototypes are those commonly cited as EMFACS, restricted to the AUs that
micro-expression corpora code; each relation row carries its source. Nothing here is estimated from any corpus:
statistics, where a run uses them, are computed from its training fold.
"""

from dataclasses import dataclass
from typing import Literal

Relation = Literal["co-occur", "antagonist", "subset", "region", "self"]
RELATIONS: tuple[Relation, ...] = ("co-occur", "antagonist", "subset", "region", "self")

AU_NAMES: dict[int, str] = {
    1: "Inner Brow Raiser",
    2: "Outer Brow Raiser",
    4: "Brow Lowerer",
    5: "Upper Lid Raiser",
    6: "Cheek Raiser",
    7: "Lid Tightener",
    8: "Lips Toward Each Other",
    9: "Nose Wrinkler",
    10: "Upper Lip Raiser",
    11: "Nasolabial Deepener",
    12: "Lip Corner Puller",
    13: "Sharp Lip Puller",
    14: "Dimpler",
    15: "Lip Corner Depressor",
    16: "Lower Lip Depressor",
    17: "Chin Raiser",
    18: "Lip Pucker",
    20: "Lip Stretcher",
    21: "Neck Tightener",
    22: "Lip Funneler",
    23: "Lip Tightener",
    24: "Lip Pressor",
    25: "Lips Part",
    26: "Jaw Drop",
    28: "Lip Suck",
    30: "Jaw Sideways",
    31: "Jaw Clencher",
    34: "Cheek Puff",
    38: "Nostril Dilator",
    39: "Nostril Compressor",
    43: "Eyes Closed",
    45: "Blink",
    56: "Head Tilt Right",
    61: "Eyes Turn Left",
    63: "Eyes Up",
    64: "Eyes Down",
}

AU_REGIONS: dict[int, str] = {
    1: "brow",
    2: "brow",
    4: "brow",
    5: "eye",
    6: "cheek",
    7: "eye",
    9: "nose",
    10: "mouth",
    12: "mouth",
    14: "mouth",
    15: "mouth",
    16: "mouth",
    17: "chin",
    18: "mouth",
    20: "mouth",
    22: "mouth",
    23: "mouth",
    24: "mouth",
    25: "mouth",
    26: "chin",
    28: "mouth",
    38: "nose",
    39: "nose",
    43: "eye",
    45: "eye",
}

# FACS manual, Table 11-1, as commonly cited (happiness also with AU25, disgust also as 10+17+4).
PROTOTYPES: dict[str, tuple[int, ...]] = {
    "happiness": (6, 12),
    "sadness": (1, 4, 15, 17),
    "surprise": (1, 2, 5, 26),
    "fear": (1, 2, 4, 5, 7, 20, 26),
    "anger": (4, 5, 7, 23, 24),
    "disgust": (4, 9, 10, 15, 16, 17),
    "contempt": (12, 14),
}


@dataclass(frozen=True, slots=True)
class RelationRow:
    """An undirected relation between two AUs and where it is written."""

    first: int
    second: int
    relation: Relation
    source: str


_MACRO = "commonly cited macro-expression relation"
# Only relations that are cited for macro-expressions stand here. Correlations measured on the micro-expression corpora
# themselves would carry the labels of every test subject into the prior; `model.training_statistics` takes such
# numbers from a training fold.
_CO_OCCUR = ((1, 2), (1, 5), (2, 5), (4, 7), (4, 9), (6, 12), (7, 12), (9, 17), (15, 17), (23, 24), (25, 26))
_ANTAGONIST = ((1, 7), (2, 6), (2, 7), (4, 12), (12, 15), (12, 17))
RELATION_ROWS: tuple[RelationRow, ...] = (
    *(RelationRow(first, second, "co-occur", _MACRO) for first, second in _CO_OCCUR),
    *(RelationRow(first, second, "antagonist", f"{_MACRO}; soft") for first, second in _ANTAGONIST),
)

CROSS_AUS: tuple[int, ...] = (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17)
"""AUs of the field's cross-dataset protocol, CD6ME (MEB, utils.dataset_aus); a corpus's own set is in its module."""


def au_name(number: int) -> str:
    """Return `"AU12 Lip Corner Puller"` for 12, and `"AU99"` for a number without a known name."""
    name = AU_NAMES.get(number)
    return f"AU{number} {name}" if name else f"AU{number}"
