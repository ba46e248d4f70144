"""Watches shape-only passes: what operations allocate and free, and when modules need their parameters.

DeepSpeed fetches a module's parameters before its passes and releases them behind. The marks between the records say
when: they come from hooks and autograd functions in the same places.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from aullm_dist.llm.layers import decoder_layers
from aullm_dist.llm.quantization import BLOCK

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


class Recorder(TorchDispatchMode):
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


def watch(network: nn.Module, recorder: Recorder, keep_gradients: bool, divided: bool) -> None:
    """Mark every module's passes where DeepSpeed's hooks are, and release gradients if they are not kept."""
    layers = dict(decoder_layers(network))
    inside = {module for layer in layers.values() for module in layer.modules()} - set(layers.values())
    for name, module in network.named_modules():
        if module not in inside:
            # ZeRO-3's engine takes the gradients of a layer when its backward pass has ended.
            taken = divided and not keep_gradients and name in layers
            waiting = list(module.parameters()) if taken else []
            _watch_module(name, module, recorder, waiting)
    if keep_gradients:
        return
    late = {p for layer in layers.values() for p in layer.parameters()} if divided else set()
    for parameter in network.parameters():
        if parameter.requires_grad and parameter not in late:
            parameter.register_post_accumulate_grad_hook(_let_go)


def _let_go(parameter: nn.Parameter) -> None:
    parameter.grad = None


def _watch_module(name: str, module: nn.Module, recorder: Recorder, waiting: Sequence[nn.Parameter]) -> None:
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


def linear_of_zero3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Zero3Linear.apply(x, weight, bias)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
