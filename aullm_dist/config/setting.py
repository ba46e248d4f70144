"""Describes a setting on its dataclass field, the one place where its meaning, range and effects are written.

Whatever else knows settings by name is derived from it: `aullm_dist.config.derived`, the checks of ranges, `aullm-dist
config` and its JSON Schema.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from aullm_dist.config.allowed import Allowed

Affects = Literal["function", "data", "execution", "output"]
"""What a setting changes: the function that is learnt, the data that it is learnt from, how it is computed, or what is
written about it."""
Occasion = Literal["resume", "prediction", "release", "ablation"]
"""Where a setting may have another value than the run had: when the run is resumed, when a checkpoint answers, when a
release answers, and in another arm of an ablation."""
Place = Literal["path", "path or name"]
"""What a setting that says where something is may hold; a name is one that we know, or that the Hub knows."""
_METADATA = "setting"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A setting that a release stores, as its model cannot be built without.

    Attributes:
        function: name under which checkpoints store it as well, with what defines their model's function. Settings of
            one name are stored as a list.
    """

    function: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What is known of a setting in addition to its type and default; the arguments of `setting`."""

    meaning: str
    affects: Affects
    allowed: Allowed | None
    may_differ: tuple[Occasion, ...]
    recorded: Recorded | None
    llm_only: bool
    place: Place | None


def setting(
    default: Any,
    meaning: str,
    affects: Affects,
    allowed: Allowed | None = None,
    *,
    may_differ: tuple[Occasion, ...] = (),
    recorded: Recorded | None = None,
    llm_only: bool = False,
    place: Place | None = None,
) -> Any:
    """Return the dataclass field of a setting.

    Args:
        default: its value where a run file does not give it.
        meaning: what it does, as `aullm-dist config` prints it.
        affects: what a change of it changes.
        allowed: its values beyond the type, such as `above(0)`; every number has such a range.
        may_differ: where its value may be another one than the run's. A setting without is the run's for good.
        recorded: that releases, or checkpoints and releases, store it with their model.
        llm_only: whether a model without an LLM has no use for it.
        place: whether it is a path, or a list of paths: `~` is the home folder, and records hold the full path.
    """
    description = Description(
        meaning=meaning,
        affects=affects,
        allowed=allowed,
        may_differ=may_differ,
        recorded=recorded,
        llm_only=llm_only,
        place=place,
    )
    return dataclasses.field(default=default, metadata={_METADATA: description})


def description_of(field: dataclasses.Field[Any]) -> Description:
    """Return the description on a field that `setting` made."""
    description = field.metadata[_METADATA]
    assert isinstance(description, Description)
    return description
