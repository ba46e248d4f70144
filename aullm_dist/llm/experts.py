"""Stores fused experts in NF4: all experts of a layer packed in one parameter, of which a product unpacks one expert.

bitsandbytes packs linear layers; the library's experts are parameters `[E, rows, columns]` of a module that takes one
expert after the other out of them. So in the parameter's place the module finds an object that gives out experts, and
a product with one of those unpacks that expert alone, in the forward pass and again in the backward pass. Memory is the
packed parameter and one expert, with or without activation checkpointing, and ZeRO-3 shards the packed parameter.

What modelling code does with all experts at once gets them unpacked: correct, and as large as they are.

Letters: E experts.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from aullm_dist.llm.layers import fused_experts
from aullm_dist.llm.quantization import BLOCK, constants_of, constants_of_blocks, is_packed, unpack
from aullm_dist.packing.forward import decoder_of


def put_packed_experts(model: PreTrainedModel) -> None:
    """Let the fused experts of a model without storage be packed ones, whose parameters are to come.

    Experts whose size is no multiple of an NF4 block stay as they are.
    """
    for full, parameter in list(fused_experts(model)):
        if parameter[0].numel() % BLOCK == 0:
            module_name, _, name = full.rpartition(".")
            module = model.get_submodule(module_name)
            if not any(isinstance(held, PackedExperts) for held in vars(module).values()):
                _take_over_linear(module)
            vars(module)[name] = PackedExperts(module, name, parameter.shape, parameter.dtype)
    if next(packed_experts(model), None) is not None:
        # One expert at a time: the library's grouped product wants all of them unpacked.
        decoder_of(model).config._experts_implementation = "eager"


def _take_over_linear(module: nn.Module) -> None:
    """Let products of a module reach packed experts, whoever has replaced torch's linear function.

    Torch's own function asks its arguments; DeepSpeed puts one in its place, under ZeRO-3, that takes tensors alone.
    """
    forward: Callable[..., Any] = module.forward

    # Loops over experts break a compiled graph in any case.
    @torch.compiler.disable
    def with_experts(*args: Any, **kwargs: Any) -> Any:
        before = functional.linear

        def linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
            if not isinstance(weight, _Expert):
                return before(input, weight, bias)
            found = weight.product(input, turned=False)
            return found if bias is None else found + bias

        setattr(functional, "linear", linear)  # noqa: B010 - a module's function has no setter for a checker
        try:
            return forward(*args, **kwargs)
        finally:
            setattr(functional, "linear", before)  # noqa: B010

    module.forward = with_experts


def packed_experts(model: nn.Module) -> Iterator[tuple[str, "PackedExperts"]]:
    """Yield name and object of every parameter that holds packed experts."""
    for module_name, module in model.named_modules():
        for name, held in vars(module).items():
            if isinstance(held, PackedExperts):
                yield f"{module_name}.{name}", held


def packed_experts_of(module: nn.Module, name: str) -> "PackedExperts | None":
    """Return the object that stands before the parameter `name` of a module, None if it is an ordinary one."""
    held = vars(module).get(name)
    return held if isinstance(held, PackedExperts) else None


def packed_shape(module: Any, name: str) -> torch.Size | None:
    """Return the shape of the weights that a packed parameter of a module stands for; None if it is not packed."""
    if is_packed(module, name):
        return torch.Size((module.out_features, module.in_features))
    held = packed_experts_of(module, name)
    return None if held is None else held.shape


class PackedExperts:
    """Stands before a packed parameter of a module, where its code looks for `[E, rows, columns]`.

    Args:
        module: holds the parameter.
        name: of the parameter there.
        shape: `[E, rows, columns]`.
        dtype: that products are computed in.
    """

    def __init__(self, module: nn.Module, name: str, shape: torch.Size, dtype: torch.dtype) -> None:
        self._module, self._name = module, name
        self.shape, self.dtype = torch.Size(shape), dtype

    @property
    def packed(self) -> nn.Parameter:
        """The packed parameter, as it is now: ZeRO-3 gathers and releases it."""
        parameter = self._module._parameters[self._name]
        assert parameter is not None
        return parameter

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return self.packed.device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one size of it."""
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """Return one expert, still packed; anything else of them unpacked."""
        is_number = isinstance(key, int) or (isinstance(key, Tensor) and key.ndim == 0 and not key.is_floating_point())
        return _Expert(self, int(key)) if is_number else self.unpacked()[key]

    def __getattr__(self, name: str) -> Any:
        """Return what a tensor has, of the unpacked experts."""
        if name.startswith("__") or name in ("ds_id", "ds_shape", "ds_numel") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.unpacked(), name)

    def unpacked(self) -> Tensor:
        """Return all experts."""
        state = getattr(self.packed, "quant_state")  # noqa: B009 - of bitsandbytes' class
        return unpack(self.packed.data, constants_of(state), self.dtype).view(self.shape)

    def unpack_one(self, packed: Tensor, number: int) -> Tensor:
        """Return one expert `[rows, columns]` of packed values."""
        weights = self.shape[1:].numel()
        state = getattr(self.packed, "quant_state")  # noqa: B009 - of bitsandbytes' class
        first, last = number * weights, (number + 1) * weights
        per_element = 2 * packed.element_size()
        part = packed.reshape(-1)[first // per_element : last // per_element]
        constants = constants_of_blocks(state, first // BLOCK, last // BLOCK)
        return unpack(part, constants, self.dtype).view(self.shape[1:])

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute anything with the unpacked experts."""
        return function(*_plain(args), **_plain(kwargs or {}))


class _Expert:
    """One packed expert `[rows, columns]`."""

    def __init__(self, experts: PackedExperts, number: int) -> None:
        self._experts, self._number = experts, number
        self.shape, self.dtype = experts.shape[1:], experts.dtype

    def unpacked(self) -> Tensor:
        """Return the expert."""
        return self._experts.unpack_one(self._experts.packed, self._number)

    def __getattr__(self, name: str) -> Any:
        """Return what a tensor has, of the unpacked expert."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.unpacked(), name)

    def product(self, x: Tensor, turned: bool) -> Tensor:
        """Return `x @ expert.T`, or `x @ expert` of an expert that is `turned`."""
        return _ExpertProduct.apply(x, self._experts.packed, self._experts, self._number, turned)

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute products with the expert packed, and anything else with it unpacked."""
        kwargs = kwargs or {}
        if len(args) >= 2 and isinstance(args[0], Tensor) and isinstance(args[1], _Expert):
            x, expert = args[:2]
            if function in _PRODUCTS and len(args) == 2 and not kwargs:
                return expert.product(x, turned=True)
        return function(*_plain(args), **_plain(kwargs))


_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def _plain(values: Any) -> Any:
    """Return arguments with everything packed in them unpacked."""
    if isinstance(values, dict):
        return {name: _plain(value) for name, value in values.items()}
    if isinstance(values, tuple | list):
        return type(values)(_plain(value) for value in values)
    return values.unpacked() if isinstance(values, PackedExperts | _Expert) else values


class _ExpertProduct(torch.autograd.Function):
    """A product with one packed expert, with a gradient for x alone; nothing unpacked is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, experts: PackedExperts, number: int, turned: bool) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.experts, ctx.number, ctx.turned = experts, number, turned
        weight = experts.unpack_one(packed, number).to(x.dtype)
        return x @ (weight if turned else weight.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        (packed,) = ctx.saved_tensors
        weight = ctx.experts.unpack_one(packed, ctx.number).to(gradient.dtype)
        return (gradient @ weight.T if ctx.turned else gradient @ weight), None, None, None, None
