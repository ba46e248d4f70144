"""Finds what forward and backward passes allocate, by running the model shape-only and watching its storages.

A decoder's layers of one kind allocate alike. So the model runs with few of them, and the records of a middle layer
stand for all of its kind; the passes of the first and the last layer are kept as they are.
"""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.integrations import moe

from aullm_dist.config import Config
from aullm_dist.log import kernels_silent
from aullm_dist.model.aullm import AULLM
from aullm_dist.model.counterfactual import Counts
from aullm_dist.model.prompt import Prompt
from aullm_dist.packing.forward import decoder_of
from aullm_dist.packing.layout import forget_positions
from aullm_dist.packing.shrink import keep_layers, layer_kinds
from aullm_dist.planning.recorder import Record, Recorder, linear_of_zero3, replaced, watch
from aullm_dist.planning.skeleton import batch_of, build, valueless


@dataclass(frozen=True, slots=True)
class Passes:
    """Records of one micro-batch, every layer included."""

    records: tuple[Record, ...]

    @property
    def saved(self) -> int:
        """Bytes that are kept at the end of the forward pass."""
        level = 0
        for record in self.records:
            if record.kind == "middle":
                break
            level += record.change
        return level

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix products."""
        return sum(record.flops for record in self.records)

    @property
    def peak(self) -> int:
        """Bytes at most."""
        level = highest = 0
        for record in self.records:
            highest = max(highest, level + record.peak)
            level += record.change
        return highest


def trace(
    config: Config,
    llm: PretrainedConfig,
    prompt: Prompt,
    counts: Counts,
    *,
    training: bool,
    keep_gradients: bool = False,
    divided: bool = False,
) -> Passes:
    """Record a micro-batch.

    Args:
        config: the run's configuration.
        llm: config of its LLM.
        prompt: of the right lengths.
        counts: what its clips become.
        training: forward and backward pass with dropout; else a forward pass for answers alone.
        keep_gradients: gradients stay with what they belong to, as under DDP; else they count no longer than it takes
            to compute them.
        divided: linear layers as DeepSpeed's ZeRO-3 computes them.
    """
    chosen, kinds = _chosen_layers(llm)

    def run(layers: list[int]) -> tuple[list[Record], str]:
        return _run(config, keep_layers(llm, layers), prompt, counts, training, keep_gradients, divided)

    records, name = run(chosen)
    passes = _Spans(records, name, len(chosen))
    # What happens outside the layers may grow with their number: casts of LoRA weights, say, are freed all at once.
    growth: dict[int, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for kind, missing in _missing(chosen, kinds).items():
        twin = next(layer for layer in chosen if 0 < layer < len(kinds) - 1 and kinds[layer] == kind)
        more, _ = run(sorted([*chosen, twin]))
        longer = _Spans(more, name, len(chosen) + 1)
        for i, (one, other) in enumerate(zip(passes.outside, longer.outside, strict=True)):
            by_peak, by_change = growth[i]
            by_peak += missing * (other.peak - one.peak)
            growth[i] = by_peak, by_change + missing * (other.change - one.change)
    return Passes(tuple(passes.all_layers(chosen, kinds, growth)))


def _run(
    config: Config,
    llm: PretrainedConfig,
    prompt: Prompt,
    counts: Counts,
    training: bool,
    keep_gradients: bool,
    divided: bool,
) -> tuple[list[Record], str]:
    """Return the records of an LLM as it is, and the name of its list of layers."""
    if config.model.quantization == "nf4_experts":
        # Which experts are called depends on values; passes are those of experts that nobody packed, less the weights.
        config = config.changed({"model.quantization": "nf4"})
    # The head is never called: whether it is there makes no difference to what passes allocate.
    network = build(config, llm, prompt, in_pieces=True)
    forget_positions()
    with valueless(network, config), kernels_silent(), contextlib.ExitStack() as at_end:
        at_end.callback(forget_positions)
        linear = linear_of_zero3 if divided else nn.functional.linear
        with Recorder() as recorder, replaced(nn.functional, "linear", linear), _experts_without_values():
            recorder.ignore(network.parameters())
            recorder.ignore(network.buffers())
            watch(network, recorder, keep_gradients, divided)
            network.train(training)
            edges = network.graph.num_edges if network.graph is not None else 0
            sizes = (int(counts.views), int(counts.structures), int(counts.branches))
            with torch.set_grad_enabled(training):
                output = network(*batch_of(config, edges, *sizes))
                recorder.mark(Record("middle"))
                if training:
                    sum(part.sum() for part in output if part is not None).backward()
            del output
            return recorder.records(), _layers_name(network)


def _experts_without_values() -> contextlib.AbstractContextManager[None]:
    """Keep the library from a product of grouped experts that has no shape-only form, in float32 for one."""
    can_use = moe._can_use_grouped_mm

    def has_form(input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> bool:
        return input.dtype == weight.dtype == torch.bfloat16 and can_use(input, weight, offs)

    return replaced(moe, "_can_use_grouped_mm", has_form)


def _chosen_layers(llm: PretrainedConfig) -> tuple[list[int], list[tuple[str, ...]]]:
    """Return which layers stand for all, and the kind of each: first, last, and one of each kind between them."""
    kinds = layer_kinds(llm)
    count = len(kinds)
    middle = {kind: layer for layer, kind in reversed(list(enumerate(kinds))) if 0 < layer < count - 1}
    return sorted({0, count - 1, *middle.values()}), kinds


def _layers_name(network: AULLM) -> str:
    decoder = decoder_of(network.reasoner.llm)
    return next(name for name, module in network.named_modules() if module is decoder.layers)


def _missing(chosen: list[int], kinds: list[tuple[str, ...]]) -> dict[tuple[str, ...], int]:
    """Return how many layers of each kind others stand for."""
    missing = Counter(kinds)
    missing.subtract(kinds[layer] for layer in chosen)
    return {kind: count for kind, count in missing.items() if count}


class _Spans:
    """Records cut into those of the layers' passes and what lies before, between and behind them."""

    def __init__(self, records: Sequence[Record], layers: str, count: int) -> None:
        self._layers = layers
        self.inside: dict[tuple[bool, int], Sequence[Record]] = {}
        self.outside: list[Record] = []
        self._order: list[Record | bool] = []
        after = 0
        for forward in (True, False):
            found = {layer: _span(records, f"{layers}.{layer}", forward) for layer in range(count)}
            spans = {layer: span for layer, span in found.items() if span is not None}
            if not spans:
                continue
            first = min(start for start, _ in spans.values())
            self._order += [*records[after:first], forward]
            self.outside += records[after:first]
            self.inside |= {(forward, layer): records[start:end] for layer, (start, end) in spans.items()}
            after = max(end for _, end in spans.values())
        self._order += records[after:]
        self.outside += records[after:]

    def all_layers(
        self, chosen: list[int], kinds: list[tuple[str, ...]], growth: Mapping[int, tuple[int, int]]
    ) -> Iterator[Record]:
        """Yield the records as if every layer had run; `growth` is added to peak and change of those outside."""
        position = 0
        for item in self._order:
            if isinstance(item, Record):
                peak, change = growth[position]
                yield replace(item, peak=item.peak + peak, change=item.change + change)
                position += 1
                continue
            for layer in range(len(kinds)) if item else reversed(range(len(kinds))):
                stands = _stand_in(layer, chosen, kinds)
                here, there = f"{self._layers}.{stands}", f"{self._layers}.{layer}"
                for record in self.inside[item, stands]:
                    name = record.module
                    if name == here or name.startswith(f"{here}."):
                        name = there + name.removeprefix(here)
                    yield replace(record, module=name)


def _stand_in(layer: int, chosen: list[int], kinds: list[tuple[str, ...]]) -> int:
    """Return the index among the layers that ran of the one that stands for `layer`."""
    if layer in chosen:
        return chosen.index(layer)
    return next(i for i, ran in enumerate(chosen) if 0 < ran < len(kinds) - 1 and kinds[ran] == kinds[layer])


def _span(records: Sequence[Record], layer: str, forward: bool) -> tuple[int, int] | None:
    """Return the first record of a layer's forward or backward pass, and the one behind its last."""
    own = [i for i, r in enumerate(records) if r.module == layer and r.forward == forward and not r.anew]
    return (own[0], own[-1] + 1) if own else None
