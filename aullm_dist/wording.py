"""Holds the wording of the structured prompt (ours), which the tiny backbone's tokenizer is trained on as well."""

from collections.abc import Sequence

from aullm_dist.facs import au_name

STRUCTURE_TEXT = " Structure:"
QUESTION_TEXT = " Deduction: active AUs?"
_STAGES_WITH_STRUCTURE = (
    "Work in three stages. Evidence: what moved on the face. "
    "Structure: which AUs occur together, exclude each other or share a region. "
    "Deduction: decide for each AU whether it is active."
)
_STAGES_WITHOUT_STRUCTURE = (
    "Work in two stages. Evidence: what moved on the face. Deduction: decide for each AU whether it is active."
)


def prefix_text(aus: Sequence[int], *, use_structure: bool = True) -> str:
    """Return the static text before the content token for the AU numbers `aus`."""
    stages = _STAGES_WITH_STRUCTURE if use_structure else _STAGES_WITHOUT_STRUCTURE
    names = ", ".join(au_name(au) for au in aus)
    return f"You code facial micro-expressions with FACS. Action units (AUs) under test: {names}. {stages}\nEvidence:"
