"""Maps stretches of the stored tensors to rows of the model's weights, and to what becomes of them.

The library names, fuses and splits weights while it loads (`llm.stored.conversion`): a layer's weight may be some rows
of a stored tensor, or the rows of several one below the other. A merge writes the files as they are laid out, so what
it does to a layer it does to these rows, wherever they stand.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from aullm_dist.errors import UserError
from aullm_dist.llm.nf4 import BLOCK
from aullm_dist.llm.stored.conversion import COMPUTED, Values
from aullm_dist.merge.adapter import Adapter, Delta

How = Literal["verbatim", "cast", "round_trip", "unpack"]


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive elements of a stored tensor of which all becomes the same."""

    first: int
    last: int
    """Not included."""
    how: How | None = None
    """None for whatever its dtype asks for."""
    delta: Delta | None = None
    weight: Values | None = None
    """The weight that it is rows of; None where nothing but its dtype is asked for."""
    place: int = 0
    """Its first element in that weight."""

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.last - self.first

    @property
    def group(self) -> Values | None:
        """The weight, if there is more of it elsewhere: the constants of NF4 blocks are of all its parts."""
        return self.weight if self.weight is not None and len(self.weight.runs) > 1 else None


def stretches_of(
    deltas: Mapping[str, Delta], hows: Mapping[str, How], weights: Mapping[str, Values], source: str
) -> dict[str, list[Stretch]]:
    """Return by the name of a stored tensor what is done to parts of it, in their order.

    Args:
        deltas: by the name of a weight.
        hows: by the name of a weight: how it is computed, if not by its dtype alone.
        weights: where each weight stands.
        source: the base, for messages.

    Raises:
        UserError: two weights share elements, or NF4's blocks cannot be distinguished from a weight's parts.
    """
    found: dict[str, list[Stretch]] = {}
    for name in dict.fromkeys((*hows, *deltas)):
        place, weight, how, delta = 0, weights[name], hows.get(name), deltas.get(name)
        for run in weight.runs:
            stretch = Stretch(run.first, run.last, how, delta, weight, place)
            if how == "round_trip" and stretch.group is not None and (place % BLOCK or run.numel % BLOCK):
                raise UserError(
                    f"{source}: {name} is put together from pieces that are no whole NF4 blocks; allowed: --base bf16"
                )
            found.setdefault(run.stored, []).append(stretch)
            place += run.numel
    for stored, some in found.items():
        some.sort(key=lambda stretch: stretch.first)
        if any(one.last > other.first for one, other in zip(some, some[1:], strict=False)):
            raise UserError(f"{source}: {stored} is more than one layer of the model; its LoRA cannot be merged")
    return found


def filled(some: Sequence[Stretch], numel: int) -> Iterator[Stretch]:
    """Yield stretches of a stored tensor of `numel` elements with what lies between them."""
    end = 0
    for stretch in some:
        if end < stretch.first:
            yield Stretch(end, stretch.first)
        yield stretch
        end = stretch.last
    if end < numel or not numel:
        yield Stretch(end, numel)


def deltas_by_weight(
    adapter: Adapter, weights: Mapping[str, Values], shapes: Mapping[str, tuple[int, int]], source: str
) -> dict[str, Delta]:
    """Return the deltas by their weight's name: each one belongs to one weight, none is left.

    Args:
        adapter: of the checkpoint.
        weights: where each weight stands, by its name.
        shapes: of the linear layers, by the name of their weight.
        source: the base, for messages.

    Raises:
        UserError: an adapter of other layers, or of one whose weight is not to be found in the files as it is.
    """
    deltas: dict[str, Delta] = {}
    for module, delta in adapter.deltas.items():
        name = f"{module}.weight"
        shape = shapes.get(name) if name in weights else None
        if shape != delta.shape:
            what = "no such linear layer" if shape is None else f"there a layer of shape {shape}"
            raise UserError(
                f"{adapter.path}: {delta.down} belongs to a layer of shape {delta.shape}, and {source} has {what}; "
                "allowed: the adapter's own base"
            )
        if not weights[name].is_rows(shape[1]):
            raise UserError(f"{source}: {name} {COMPUTED}; its LoRA cannot be merged")
        deltas[name] = delta
    assert sum(len(delta.keys) for delta in deltas.values()) == len(adapter.files.tensors)
    return deltas


def dense(weight: Values, shape: tuple[int, int]) -> Values:
    """Return a weight whose packed values will stand unpacked in the new files, as it will stand there."""
    run = weight.runs[0]
    return replace(weight, shape=shape, runs=(replace(run, first=0, last=shape[0] * shape[1]),))
