"""Finds a model's parameters in its files where the library renames, fuses or splits weights while it loads.

Published files name every expert of a mixture by itself, and the library's layers hold all experts of a layer in one
parameter. Which names become which parameter is the library's knowledge (`transformers.conversion_mapping`), and is
taken from there. What its operations do to the values is followed here as a list of runs of stored values, so that any
run of a parameter's flat values can be read alone. Operations that no such list describes, transpositions for one, are
left to the library itself, one whole parameter at a time.
"""

import bisect
import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from aullm_dist.library_errors import LIBRARY_ERRORS, in_one_line
from aullm_dist.llm.stored.weight_files import StoredTensor, WeightFiles

COMPUTED = "is computed by the library from what stands in the files, rather than being rows of it"
_MOST_RUNS = 2**17
"""Runs of one parameter that are worth following; more are left to the library."""


@dataclass(frozen=True, slots=True)
class Run:
    """Elements `first` up to, not including, `last` of a stored tensor's flat values."""

    stored: str
    first: int
    last: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.last - self.first


@dataclass(frozen=True, slots=True)
class Values:
    """Where the values of one parameter stand in the files."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[Run, ...]
    """In the order of the parameter's flat values."""
    whole: bool
    """Whether they are one stored tensor as it is."""
    make: "Callable[[Source], Tensor] | None" = field(default=None, compare=False)
    """Makes the flat parameter where its values are no runs of stored ones; `runs` then says what is read for that."""
    problem: str = ""
    """Why the library can make no parameter of what stands in the files; empty if it can."""

    @property
    def stored(self) -> str | None:
        """Name of the one stored tensor that holds the values as they are, None if there is no such tensor."""
        return self.runs[0].stored if self.whole else None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(run.numel for run in self.runs) * self.dtype.itemsize

    def read(self, files: WeightFiles, first: int, last: int) -> Tensor:
        """Return elements `first` up to, not including, `last` of the parameter's flat values."""
        if self.make is not None:
            return self.make(files)[first:last]
        found = [files.read(run.stored, run.first, run.last) for run in self.part(first, last)]
        return found[0] if len(found) == 1 else torch.cat(found)

    def is_rows(self, columns: int) -> bool:
        """Return whether the values are whole rows of stored tensors, in which a merge can put what is added to them.

        Args:
            columns: values of a row.
        """
        return self.whole or (
            self.make is None and all(run.first % columns == run.numel % columns == 0 for run in self.runs)
        )

    def part(self, first: int, last: int) -> list[Run]:
        """Return where elements `first` up to, not including, `last` of the parameter's flat values stand."""
        return _cut(self.runs, first, last)


class Source(Protocol):
    """Stored tensors by name."""

    def read(self, name: str) -> Tensor:
        """Return a tensor, flat."""

    def __getitem__(self, name: str) -> StoredTensor: ...


def find_values(model: PreTrainedModel, files: WeightFiles | Mapping[str, StoredTensor]) -> dict[str, Values]:
    """Return where the parameters and persistent buffers of a model stand in the files; what is missing is left out.

    Args:
        model: on the meta device; layers that the files hold packed may be packed layers.
        files: its files, or only what they say of their tensors.
    """
    tensors = files.tensors if isinstance(files, WeightFiles) else files
    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    found: dict[str, Values] = {}
    collected: dict[str, tuple[WeightConverter, dict[str, list[str]]]] = {}
    prefix = model.base_model_prefix
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            continue
        if pattern is None:
            found.setdefault(name, as_stored(key, tensors[key]))
        else:
            collected.setdefault(name, (by_pattern[pattern], {}))[1].setdefault(pattern, []).append(key)
    for name, (converter, keys) in collected.items():
        found |= _converted(model, name, converter, keys, tensors)
    return found


def as_stored(key: str, tensor: StoredTensor) -> Values:
    """Return the values of one stored tensor as they are."""
    return Values(tuple(tensor.shape), tensor.dtype, (Run(key, 0, tensor.numel),), whole=True)


def _cut(runs: Sequence[Run], first: int, last: int) -> list[Run]:
    """Return what of `runs` makes their elements `first` up to, not including, `last`."""
    ends = list(itertools.accumulate(run.numel for run in runs))
    cut, place = [], bisect.bisect_right(ends, first)
    while first < last:
        run, end = runs[place], ends[place]
        start = run.last - (end - first)
        stop = min(run.last, start + last - first)
        cut.append(Run(run.stored, start, stop))
        first, place = end, place + 1
    return cut or [Run(runs[0].stored, 0, 0)]


class _Unknown(Exception):
    """An operation that no runs describe."""


@dataclass(frozen=True, slots=True)
class _Block:
    """A tensor as runs of stored values."""

    shape: tuple[int, ...]
    runs: tuple[Run, ...]


def _converted(
    model: PreTrainedModel,
    name: str,
    converter: WeightConverter,
    keys: Mapping[str, list[str]],
    tensors: Mapping[str, StoredTensor],
) -> dict[str, Values]:
    """Return the values of all parameters that a converter makes of stored tensors; `name` is the first of them."""
    stored = [tensors[key] for some in keys.values() for key in some]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in stored))
    blocks: dict[str, list[_Block]] = {
        pattern: [_Block(tuple(tensors[key].shape), (Run(key, 0, tensors[key].numel),)) for key in some]
        for pattern, some in keys.items()
    }
    try:
        for operation in converter.operations:
            blocks = _apply(operation, blocks, converter, model, name)
        made = {_full(name, target): _only(block) for target, block in blocks.items()}
        return {full: Values(block.shape, dtype, _joined(block.runs), whole=False) for full, block in made.items()}
    except _Unknown:
        pass
    everything = tuple(Run(key, 0, tensors[key].numel) for some in keys.values() for key in some)
    convert = _Conversion(model, name, converter, keys)
    wanted = model.state_dict()
    targets = [full for target in converter.target_patterns if (full := _full(name, target)) in wanted]
    # Shapes alone first: what does not fit together is to be said before anything is read.
    try:
        shapes = {full: tuple(part.shape) for full, part in convert.parts(_without_values(tensors)).items()}
        problem = ""
    except LIBRARY_ERRORS as error:
        shapes, problem = {}, f"cannot be put together: {in_one_line(error)}"
    return {
        full: Values(shapes.get(full, ()), dtype, everything, False, functools.partial(convert, full), problem)
        for full in targets
    }


def _without_values(tensors: Mapping[str, StoredTensor]) -> Callable[[str], Tensor]:
    return lambda key: torch.empty(tensors[key].shape, dtype=tensors[key].dtype, device="meta")


def _full(name: str, target: str) -> str:
    return name if target in name else target


def _apply(
    operation: Any, blocks: dict[str, list[_Block]], converter: WeightConverter, model: PreTrainedModel, name: str
) -> dict[str, list[_Block]]:
    """Return what an operation of the library makes of blocks, by the names that it gives them.

    Source: the `convert` methods of `transformers.core_model_loading`.
    """
    targets = converter.target_patterns
    if type(operation) is MergeModulelist:
        merged: dict[str, list[_Block]] = {}
        for pattern, some in blocks.items():
            merged[operation.get_target_pattern(len(blocks), pattern, targets)] = [_stack(some, operation.dim)]
        return merged
    if type(operation) is Concatenate:
        ordered = [block for pattern in converter.source_patterns for block in blocks.get(pattern, [])]
        return {targets[0]: [_concatenate(ordered, operation.dim)]}
    if len(blocks) != 1:
        raise _Unknown
    block = _only(next(iter(blocks.values())))
    if type(operation) is Chunk and operation.num_shards_attribute is None and len(targets) > 1:
        size = block.shape[operation.dim]
        if size % len(targets):
            raise _Unknown
        parts = _split(block, [size // len(targets)] * len(targets), operation.dim)
    elif type(operation) is Split:
        sizes = [model.get_parameter(name.replace(targets[0], each)).shape[operation.dim] for each in targets]
        parts = _split(block, sizes, operation.dim)
    elif type(operation) is SplitModulelist and operation.dim == 0 and len(targets) == 1:
        parts = [_Block(part.shape[1:], part.runs) for part in _split(block, [1] * block.shape[0], 0)]
        return {targets[0].replace("*", str(number)): [part] for number, part in enumerate(parts)}
    else:
        raise _Unknown
    first = _full(name, targets[0])
    return {first.replace(targets[0], target): [part] for target, part in zip(targets, parts, strict=True)}


def _only(blocks: list[_Block]) -> _Block:
    if len(blocks) != 1:
        raise _Unknown
    return blocks[0]


def _stack(blocks: list[_Block], dim: int) -> _Block:
    if dim != 0 or len({block.shape for block in blocks}) != 1:
        raise _Unknown
    return _Block((len(blocks), *blocks[0].shape), tuple(run for block in blocks for run in block.runs))


def _concatenate(blocks: list[_Block], dim: int) -> _Block:
    shape = list(blocks[0].shape)
    if len({(*block.shape[:dim], None, *block.shape[dim + 1 :]) for block in blocks}) != 1:
        raise _Unknown
    shape[dim] = sum(block.shape[dim] for block in blocks)
    outer = math.prod(shape[:dim])
    if outer * len(blocks) > _MOST_RUNS:
        raise _Unknown
    inner = [math.prod(block.shape[dim:]) for block in blocks]
    runs = [
        run
        for place in range(outer)
        for block, size in zip(blocks, inner, strict=True)
        for run in _cut(block.runs, place * size, (place + 1) * size)
    ]
    return _Block(tuple(shape), tuple(runs))


def _split(block: _Block, sizes: Sequence[int], dim: int) -> list[_Block]:
    outer, rest = math.prod(block.shape[:dim]), math.prod(block.shape[dim + 1 :])
    if outer * len(sizes) > _MOST_RUNS or sum(sizes) != block.shape[dim]:
        raise _Unknown
    row, begin, parts = block.shape[dim] * rest, 0, []
    for size in sizes:
        places = (place * row + begin * rest for place in range(outer))
        runs = [run for place in places for run in _cut(block.runs, place, place + size * rest)]
        shape = (*block.shape[:dim], size, *block.shape[dim + 1 :])
        parts.append(_Block(shape, tuple(runs)))
        begin += size
    return parts


def _joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    """Return the same runs, those that follow each other in one tensor made one."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].stored == run.stored and joined[-1].last == run.first:
            run = Run(run.stored, joined.pop().first, run.last)
        joined.append(run)
    return tuple(joined)


class _Conversion:
    """Has the library itself make parameters of stored tensors, and keeps what was made last."""

    def __init__(
        self, model: PreTrainedModel, name: str, converter: WeightConverter, keys: Mapping[str, list[str]]
    ) -> None:
        self._model, self._name, self._converter, self._keys = model, name, converter, keys
        self._made: dict[str, Tensor] = {}

    def parts(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return all parameters that the library makes of the stored tensors that `read` returns."""
        converter = copy.deepcopy(self._converter)
        for pattern, keys in self._keys.items():
            for key in keys:
                tensor: Any = read(key)
                converter.add_tensor(self._name, key, pattern, tensor)
        found = converter.convert(self._name, model=self._model, config=self._model.config)
        return {name: (part[0] if isinstance(part, list) else part) for name, part in found.items()}

    def __call__(self, full: str, files: Source) -> Tensor:
        if full not in self._made:
            self._made = self.parts(lambda key: files.read(key).view(files[key].shape))
        # Whoever asks for a parameter asks for all of it before the next one.
        return self._made[full].reshape(-1)
