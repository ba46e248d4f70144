"""What forward and backward passes allocate, found by running the model without values and watching its storages.

A decoder's layers of one kind allocate alike. So the model runs with few of them, and the records of a middle layer
stand for all of its kind; the passes of the first and the last layer are kept as they are.

DeepSpeed fetches a module's parameters before its passes and releases them behind. The marks between the records say
when: they come from hooks and autograd functions in the same places.
"""

import contextlib
import copy
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers import PretrainedConfig

from aullm_dist.config import Config
from aullm_dist.model.aullm import AULLM
from aullm_dist.model.counterfactual import Counts
from aullm_dist.model.llm import decoder_layers
from aullm_dist.model.packing import decoder_of, forget_positions
from aullm_dist.model.prompt import Prompt
from aullm_dist.model.quantization import BLOCK
from aullm_dist.planning.skeleton import batch_of, build, valueless

Kind = Literal["begin", "fetch", "release", "middle"]


@dataclass(frozen=True, slots=True)
class Record:
    """A moment of a pass, and the memory from there to the next one.

    Attributes:
        kind: `fetch` or `release` of a module's parameters, `begin`, or `middle`: between forward and backward.
        module: name of the module.
        forward: whether it is a forward pass of the module.
        anew: whether that forward pass happens in the backward pass, for activation checkpointing.
        peak: bytes at most, above the level before this moment.
        change: bytes by which the level has changed at the next moment.
        flops: floating-point operations of matrix products and attention.
    """

    kind: Kind
    module: str = ""
    forward: bool = True
    anew: bool = False
    peak: int = 0
    change: int = 0
    flops: int = 0


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
        keep_gradients: gradients stay beside what they belong to, as under DDP; else they count no longer than it takes
            to compute them.
        divided: linear layers as DeepSpeed's ZeRO-3 computes them.
    """
    chosen, kinds = _chosen_layers(llm)

    def run(layers: list[int]) -> tuple[list[Record], str]:
        small = copy.deepcopy(llm)
        small.num_hidden_layers = len(layers)
        if getattr(small, "layer_types", None):
            small.layer_types = [kinds[layer] for layer in layers]
        return _run(config, small, prompt, counts, training, keep_gradients, divided)

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
    # The head is never called: whether it is there makes no difference to what passes allocate.
    network = build(config, llm, prompt, in_pieces=True)
    forget_positions()
    with valueless(network, config), contextlib.ExitStack() as at_end:
        at_end.callback(forget_positions)
        linear = _linear_of_zero3 if divided else nn.functional.linear
        with _Recorder() as recorder, _replaced(nn.functional, "linear", linear):
            recorder.ignore(network.parameters())
            recorder.ignore(network.buffers())
            _watch(network, recorder, keep_gradients, divided)
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


def _chosen_layers(llm: PretrainedConfig) -> tuple[list[int], list[str]]:
    """Return which layers stand for all, and the kind of each: first, last, and one of each kind between them."""
    count = llm.num_hidden_layers
    kinds = list(getattr(llm, "layer_types", None) or ["full_attention"] * count)
    middle = {kind: layer for layer, kind in reversed(list(enumerate(kinds))) if 0 < layer < count - 1}
    return sorted({0, count - 1, *middle.values()}), kinds


def _layers_name(network: AULLM) -> str:
    decoder = decoder_of(network.reasoner.llm)
    return next(name for name, module in network.named_modules() if module is decoder.layers)


def _missing(chosen: list[int], kinds: list[str]) -> dict[str, int]:
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
            spans = {layer: _span(records, f"{layers}.{layer}", forward) for layer in range(count)}
            spans = {layer: span for layer, span in spans.items() if span is not None}
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
        self, chosen: list[int], kinds: list[str], growth: Mapping[int, tuple[int, int]]
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


def _stand_in(layer: int, chosen: list[int], kinds: list[str]) -> int:
    """Return the index among the layers that ran of the one that stands for `layer`."""
    if layer in chosen:
        return chosen.index(layer)
    return next(i for i, ran in enumerate(chosen) if 0 < ran < len(kinds) - 1 and kinds[ran] == kinds[layer])


def _span(records: Sequence[Record], layer: str, forward: bool) -> tuple[int, int] | None:
    """Return the first record of a layer's forward or backward pass, and the one behind its last."""
    own = [i for i, r in enumerate(records) if r.module == layer and r.forward == forward and not r.anew]
    return (own[0], own[-1] + 1) if own else None


class _Recorder(TorchDispatchMode):
    """Counts the storages that operations make, until nothing holds them any more."""

    def __init__(self) -> None:
        super().__init__()
        self._known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._level = self._peak = self._before = self._flops = 0
        self._records: list[Record] = []
        self._now = Record("begin")

    def ignore(self, tensors: Iterator[Tensor]) -> None:
        """Leave out what is there before the passes."""
        for tensor in tensors:
            self._known[tensor.untyped_storage()] = True

    def mark(self, record: Record) -> None:
        """Begin a record."""
        self._close()
        self._now = record

    def records(self) -> list[Record]:
        """Return what was recorded."""
        self._close()
        return self._records

    def _close(self) -> None:
        peak, change = self._peak - self._before, self._level - self._before
        self._records.append(replace(self._now, peak=peak, change=change, flops=self._flops))
        self._before = self._peak = self._level
        self._flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            # Checks of values: there are none.
            return 0
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        if function.name().startswith("bitsandbytes::gemm_4bit"):
            self._peak = max(self._peak, self._level + _unpacked(args))
            self._flops += 2 * args[0].numel() * args[2][0]
        elif function.overloadpacket in flop_registry:
            self._flops += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self._level += size
        self._peak = max(self._peak, self._level)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._level -= size


def _unpacked(args: Sequence[Any]) -> int:
    """Return what bitsandbytes' product allocates within: the weight unpacked, its constants in float32, twice."""
    values, _, shape = args[:3]
    weights = shape[0] * shape[1]
    return weights * values.element_size() + 2 * 4 * -(-weights // BLOCK)


def _watch(network: nn.Module, recorder: _Recorder, keep_gradients: bool, divided: bool) -> None:
    """Mark every module's passes where DeepSpeed's hooks are, and let go of gradients if they are not kept."""
    layers = dict(decoder_layers(network))
    inside = {module for layer in layers.values() for module in layer.modules()} - set(layers.values())
    for name, module in network.named_modules():
        if module not in inside:
            # ZeRO-3 takes the gradients of a layer when its backward pass has ended.
            waiting = list(module.parameters()) if divided and name in layers else []
            _watch_module(name, module, recorder, waiting)
    if keep_gradients:
        return
    late = {p for layer in layers.values() for p in layer.parameters()} if divided else set()
    for parameter in network.parameters():
        if parameter.requires_grad and parameter not in late:
            parameter.register_post_accumulate_grad_hook(_let_go)


def _let_go(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _watch_module(name: str, module: nn.Module, recorder: _Recorder, waiting: Sequence[nn.Parameter]) -> None:
    left = [0]

    class Behind(torch.autograd.Function):
        """Around what goes in: its backward pass comes behind the module's."""

        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            left[0] += 1
            return tensor.detach()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            left[0] -= 1
            if left[0] == 0:
                recorder.mark(Record("release", name, forward=False))
                for parameter in waiting:
                    _let_go(parameter)
            return gradient

    class Ahead(torch.autograd.Function):
        """Around what comes out: its backward pass comes before the module's."""

        @staticmethod
        def forward(ctx: Any, tensor: Tensor) -> Tensor:
            return tensor.detach()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            recorder.mark(Record("fetch", name, forward=False))
            return gradient

    def before(_: nn.Module, inputs: tuple) -> tuple:
        recorder.mark(Record("fetch", name, anew=torch._C._current_graph_task_id() != -1))
        left[0] = 0
        return _around(Behind.apply, inputs)

    def behind(_: nn.Module, __: tuple, output: Any) -> Any:
        recorder.mark(Record("release", name, anew=torch._C._current_graph_task_id() != -1))
        return _around(Ahead.apply, output)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(behind)


def _around(function: Callable[[Tensor], Tensor], values: Any) -> Any:
    """Apply a function to the tensors with gradients among positional inputs or outputs."""
    if not torch.is_grad_enabled():
        return values
    return tree_map_only(Tensor, lambda t: function(t) if t.requires_grad else t, values)


class _Zero3Linear(torch.autograd.Function):
    """A product that keeps its input and the parameter itself, as DeepSpeed's does.

    Source: deepspeed.runtime.zero.linear.LinearFunctionForZeroStage3.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        if x.dim() == 2 and bias is not None:
            return torch.addmm(bias, x, weight.t())
        output = x.matmul(weight.t())
        if bias is not None:
            output += bias
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        with torch.autocast("cpu", dtype=ctx.cast or torch.bfloat16, enabled=ctx.cast is not None):
            rows = gradient.reshape(-1, gradient.shape[-1])
            to_x = gradient.matmul(weight) if ctx.needs_input_grad[0] else None
            to_weight = rows.t().matmul(x.reshape(-1, x.shape[-1])) if ctx.needs_input_grad[1] else None
            to_bias = rows.sum(0) if bias is not None and ctx.needs_input_grad[2] else None
        return to_x, to_weight, to_bias


def _linear_of_zero3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Zero3Linear.apply(x, weight, bias)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
