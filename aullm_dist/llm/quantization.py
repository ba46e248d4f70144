"""Keeps a frozen base in 4 bits per weight (NF4), with fixes where bitsandbytes trains wrongly or wastes memory.

The only module that imports bitsandbytes, and inside functions alone. `prepare` must see every model that holds NF4
layers, however it was loaded. Which process packs what (`llm.pieces`) is not its business.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from aullm_dist.errors import UserError
from aullm_dist.llm.nf4 import BLOCK, Packer, block_maxima

QUANTIZATIONS = ("none", "nf4", "nf4_experts")
_NF4 = "bitsandbytes NF4"
_STORAGES = ("bfloat16", "uint8")
_PACKS_FOR_CPU = "support_avx512bf16_for_cpu"


def nf4_config(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return what transformers needs to quantise linear layers while it loads them.

    The quantisation constants are quantised in turn: 1/64 instead of 4/64 byte per weight, and every process keeps all
    of them even where the weights are sharded. Packed weights are stored as bfloat16, a dtype that ZeRO-3 can flatten.

    Args:
        compute_dtype: dtype of the matrix products.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_storage=torch.bfloat16,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def is_stored_in_nf4(source: str, config: PretrainedConfig, quantization: str) -> bool:
    """Return whether the files of a backbone hold NF4 weights, checked against what was asked for.

    What its publisher computed in, often float16, is no property of the weights: `prepare` decides that.

    Args:
        source: the backbone's name, for messages.
        config: its config.
        quantization: one of `QUANTIZATIONS`.

    Raises:
        UserError: an unknown quantisation, files quantised by another method, NF4 that was not asked for, a storage
            dtype that does not work.
    """
    if quantization not in QUANTIZATIONS:
        raise UserError(f"backbone: quantization is {quantization!r}; allowed: {', '.join(QUANTIZATIONS)}")
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return False
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = _method(stored)
    if method != _NF4:
        raise UserError(
            f"backbone {source}: its files are quantised by {method}; allowed: {_NF4}, or files that are not quantised"
        )
    if quantization == "none":
        raise UserError(f"backbone {source}: its files are quantised by {_NF4}; set model.quantization=nf4")
    storage = str(stored.get("bnb_4bit_quant_storage") or "uint8")
    if storage not in _STORAGES:
        raise UserError(f"backbone {source}: its NF4 weights are stored as {storage}; allowed: {', '.join(_STORAGES)}")
    return True


def _method(stored: dict) -> str:
    method = stored.get("quant_method") or "bitsandbytes"
    method = str(getattr(method, "value", method))
    if not method.startswith("bitsandbytes"):
        return method
    if stored.get("load_in_4bit") or stored.get("_load_in_4bit"):
        return f"bitsandbytes {str(stored.get('bnb_4bit_quant_type', 'fp4')).upper()}"
    return "bitsandbytes 8-bit"


def method_of(config: PretrainedConfig) -> str | None:
    """Return how the files of a backbone are quantised, None if they are not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return _method(stored if isinstance(stored, dict) else stored.to_dict())


def put_packed_layers(model: nn.Module, config: BitsAndBytesConfig, stored: bool, plain: Sequence[str] = ()) -> None:
    """Put NF4 layers in the place of the linear layers of a model without storage.

    Args:
        model: on the meta device, without its vocabulary head, which stays as it is.
        config: from `nf4_config`.
        stored: whether packed weights will come from files.
        plain: layers that stay as they are.
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    replace_with_bnb_linear(model, modules_to_not_convert=list(plain), quantization_config=config, pre_quantized=stored)


def is_packed(module: nn.Module, name: str) -> bool:
    """Whether the parameter `name` of a module is a packed weight."""
    return name == "weight" and type(module).__name__ == "Linear4bit"


def pack(values: Tensor, config: BitsAndBytesConfig) -> tuple[Tensor, Tensor]:
    """Return weights in NF4, flat in the storage dtype, and the float32 constants of their blocks.

    Args:
        values: flat weights, whole blocks but for a last one.
        config: from `nf4_config`.
    """
    from bitsandbytes.functional import quantize_4bit

    if values.device.type == "cpu" and len(values) % BLOCK == 0:
        maxima = block_maxima(values)
        return make_packer().pack(values, maxima).view(config.bnb_4bit_quant_storage), maxima
    packed, state = quantize_4bit(
        values,
        blocksize=BLOCK,
        quant_type=config.bnb_4bit_quant_type,
        quant_storage=config.bnb_4bit_quant_storage,
    )
    return packed.view(-1), state.absmax


def state_of(constants: Tensor, shape: torch.Size, dtype: torch.dtype, config: BitsAndBytesConfig) -> Any:
    """Return the quantisation state of a whole weight, from the constants of all its blocks.

    Source: bitsandbytes.functional.quantize_4bit with `compress_statistics`.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    offset = constants.mean()
    packed, nested = quantize_blockwise(constants - offset, blocksize=256)
    return QuantState(
        absmax=packed,
        shape=shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=get_4bit_type(config.bnb_4bit_quant_type, device=constants.device),
        quant_type=config.bnb_4bit_quant_type,
        offset=offset,
        state2=nested,
    )


def constants_of(state: Any) -> Tensor:
    """Return the float32 constants of a weight's blocks as its products use them, from its quantisation state."""
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax.float()


def constants_of_blocks(state: Any, first: int, last: int) -> Tensor:
    """Return `constants_of` blocks `first` up to, not including, `last`, without computing the others."""
    if not state.nested:
        return state.absmax[first:last].float()
    nested = state.state2
    of_block = torch.arange(first, last, device=state.absmax.device) // nested.blocksize
    return nested.code[state.absmax[first:last].int()] * nested.absmax[of_block] + state.offset


def unpack(packed: Tensor, constants: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the flat weights that packed values stand for, as the products of training see them.

    Args:
        packed: flat, of any storage dtype, whole blocks.
        constants: of these blocks (`constants_of`).
        dtype: that the products are computed in.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type

    packed = packed.view(-1, 1)
    # Rows of one block: on CPUs the library takes other rows' constants where rows are no multiples of blocks.
    shape = torch.Size((len(constants), BLOCK))
    code = get_4bit_type("nf4", device=packed.device)
    state = QuantState(constants, shape=shape, dtype=dtype, blocksize=BLOCK, code=code, quant_type="nf4")
    return dequantize_4bit(packed, state).reshape(-1)


def make_packer() -> Packer:
    """Return what packs weights on a CPU."""
    from bitsandbytes.functional import get_4bit_type

    return Packer(get_4bit_type("nf4", device="cpu"))


def valueless_state(shape: torch.Size, dtype: torch.dtype, device: str) -> Any:
    """Return a state as `state_of` makes it, whose tensors have their shapes and dtypes and no values.

    Args:
        shape: of the weight.
        dtype: that it is dequantised to.
        device: of the tensors, `meta` for instance.
    """
    from bitsandbytes.functional import QuantState

    blocks = -(-shape.numel() // BLOCK)

    def empty(size: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=kind, device=device)

    nested = QuantState(absmax=empty(-(-blocks // 256)), code=empty(256), blocksize=256, dtype=torch.float32)
    return QuantState(
        absmax=empty(blocks, torch.uint8),
        shape=shape,
        dtype=dtype,
        blocksize=BLOCK,
        code=empty(16),
        quant_type="nf4",
        offset=torch.empty((), device=device),
        state2=nested,
    )


def stored_state(parts: dict[str, Tensor], device: torch.device) -> Any:
    """Return the quantisation state of a stored weight from the tensors that its files hold next to it.

    Raises:
        KeyError: a part is missing.
        ValueError: a part is no such part.
    """
    from bitsandbytes.functional import QuantState

    return QuantState.from_dict(parts, device=device)


def packed_parameter(packed: Tensor, state: Any, module: Any = None) -> nn.Parameter:
    """Return the weight of an NF4 layer, and give the layer its state.

    Args:
        packed: packed values, flat.
        state: of the whole weight.
        module: the layer; None for what is no layer's weight.
    """
    from bitsandbytes.nn import Params4bit

    if module is not None:
        module.quant_state = state
    return Params4bit(
        packed.view(-1, 1),
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=packed.dtype,
        module=module,
        bnb_quantized=True,
    )


def prepare(model: nn.Module, compute_dtype: torch.dtype) -> str:
    """Make the NF4 layers of a loaded model fit for training, and describe them for the log.

    Args:
        model: the causal LM, with at least one NF4 layer.
        compute_dtype: dtype of the matrix products.

    Raises:
        UserError: no layer is quantised, or a bitsandbytes in which the remedy for its CPU layout does not take.
    """
    layers = [layer for _, layer in _nf4_layers(model)]
    if not layers:
        raise UserError("backbone: has no linear layer that NF4 could quantise; set model.quantization=none")
    for layer in layers:
        _keep_layout(layer)
        layer.compute_dtype = compute_dtype
        # The forward pass dequantises to the dtype of its input, the backward pass to this one: they must agree.
        layer.weight.quant_state.dtype = compute_dtype
    save_packed_weights_for_backward()
    doubled = all(layer.weight.quant_state.nested for layer in layers)
    storages = sorted({_name(layer.weight.dtype) for layer in layers})
    return (
        f"NF4, {'double' if doubled else 'single'} quantisation, {' and '.join(storages)} storage, "
        f"{len(layers)} linear layers; computed in {_name(compute_dtype)}"
    )


def misshapen_weights(model: nn.Module) -> list[str]:
    """Return the names of packed weights that do not fit their layer: the library loads those silently.

    Args:
        model: the plain causal LM, straight from the library.
    """
    from bitsandbytes.nn import Linear4bit

    found = []
    for name, layer in model.named_modules():
        state = getattr(layer.weight, "quant_state", None) if isinstance(layer, Linear4bit) else None
        if state is not None:
            held = 2 * layer.weight.numel() * layer.weight.element_size()
            count = layer.out_features * layer.in_features
            fits = tuple(state.shape) == (layer.out_features, layer.in_features) and held == count + count % 2
            if not fits or state.absmax.numel() != -(-count // state.blocksize):
                found.append(f"{name}.weight")
    return found


def quantized_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the linear layers that hold NF4 weights, as on the plain causal LM, in model order.

    Args:
        model: causal LM, wrapped by PEFT or not.
    """
    network: Any = model
    causal_lm = network.get_base_model() if hasattr(network, "get_base_model") else network
    # PEFT puts itself in the place of a layer and keeps that as `base_layer`.
    return tuple(name.removesuffix(".base_layer") for name, _ in _nf4_layers(causal_lm))


def num_weights(parameters: Iterable[nn.Parameter]) -> int:
    """Return how many weights parameters stand for; a packed one stands for more than it has elements."""
    states = ((parameter, getattr(parameter, "quant_state", None)) for parameter in parameters)
    # A parameter that ZeRO-3 partitioned has no elements of its own.
    return sum(
        getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel()
        for parameter, state in states
    )


def packed_share(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Return bytes of packed parameters, their quantisation constants included, and bytes of the others."""
    packed = others = 0
    for parameter in parameters:
        # A parameter that ZeRO-3 partitioned has no elements of its own.
        nbytes = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is None:
            others += nbytes
        else:
            constants = [state.absmax, *([state.state2.absmax] if state.nested else [])]
            packed += nbytes + sum(tensor.nbytes for tensor in constants)
    return packed, others


def save_packed_weights_for_backward() -> None:
    """Let NF4 products keep their packed weight through `save_for_backward`, in this process; again is no change.

    bitsandbytes keeps a view of it as an attribute instead. Under ZeRO-3 that view holds the storage gathered for the
    forward pass until the backward pass: every process ends up with the whole model, and activation checkpointing
    cannot help, as attributes bypass the hooks for saved tensors. bitsandbytes issue 2034 and pull request 2035 are
    about this; `test_upstream_still_keeps_packed_weights_alive` says when it is fixed.
    """
    import bitsandbytes

    upstream = bitsandbytes.matmul_4bit
    if getattr(upstream, "_aullm_saves_weights", False):
        return

    # Linear4bit looks this function up in the package each time it is called.
    @functools.wraps(upstream)
    def matmul_4bit(
        A: Tensor, B: Tensor, quant_state: Any, out: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        ours = (
            torch.is_grad_enabled()
            and A.requires_grad
            and A.numel() > 0
            and A.shape[-1] == quant_state.shape[1]
            and out is None
            and (bias is None or not bias.requires_grad)
        )
        if ours:
            return _PackedProduct.apply(A, B, bias, quant_state, upstream)
        return upstream(A, B, quant_state, out=out, bias=bias)

    setattr(matmul_4bit, "_aullm_saves_weights", True)  # noqa: B010 - a function has no attributes for a checker
    bitsandbytes.matmul_4bit = matmul_4bit


class _PackedProduct(torch.autograd.Function):
    """`x @ dequantised.T + bias` with a gradient for x alone: bitsandbytes' own function, but for what it keeps."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, packed: Tensor, bias: Tensor | None, quant_state: Any, product: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.quant_state = quant_state
        # Gradients are off in here, so upstream keeps nothing.
        return product(x, packed, quant_state, bias=bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        from bitsandbytes.functional import dequantize_4bit

        (packed,) = ctx.saved_tensors
        weight = dequantize_4bit(packed.view(-1, 1), ctx.quant_state).to(gradient.dtype)
        return gradient @ weight, None, None, None, None


def _keep_layout(layer: nn.Module) -> None:
    """Forbid a layer to repack its weight.

    On CPUs with AVX512-BF16, one forward pass without gradients in eval mode repacks the weight in place, rounds its
    constants, and sends later training passes through a product that has no gradient: after the first evaluation
    nothing is learnt any more, silently. See also bitsandbytes issue 2078, moving a repacked weight to a GPU.
    """
    if not hasattr(layer, _PACKS_FOR_CPU):
        raise UserError(
            f"bitsandbytes {version('bitsandbytes')}: Linear4bit has no {_PACKS_FOR_CPU}, without which evaluations "
            "can spoil training on CPUs; allowed: a version that this project was tested with (constraints.txt)"
        )
    setattr(layer, _PACKS_FOR_CPU, False)


def _nf4_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    from bitsandbytes.nn import Linear4bit

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            state = getattr(module.weight, "quant_state")  # noqa: B009 - of Params4bit, as which torch types no weight
            assert state is not None, f"{name}: a 4-bit layer whose weight is not quantised"
            assert state.quant_type == "nf4", f"{name}: quantised to {state.quant_type}"
            yield name, module


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
