"""Loads an LLM in pieces: every process reads and quantises its own part of each weight, none holds a copy of all.

The model is built without storage. Parameter after parameter, each process reads its share of the flat values, packs it
to NF4 if it is a quantised weight, and hands it to the `Placement`: that leaves it partitioned (ZeRO-3), or completes
it on the device from what the others read (DDP, ZeRO-1 and -2). Over all processes the checkpoint is read once.

Bit for bit the result is bitsandbytes' own: NF4 blocks of 64 weights are independent of each other, and the constants
that describe them are put together before they are quantised in turn.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from aullm_dist.errors import UserError
from aullm_dist.llm.base_check import holds_finite, refuse_not_finite
from aullm_dist.llm.experts import packed_shape, put_packed_experts
from aullm_dist.llm.pieces.buffers import fill_buffers, load_buffers
from aullm_dist.llm.pieces.placement import Placement, piece_of
from aullm_dist.llm.pieces.skeleton import dtypes_of, mark_quantized, model_without_storage
from aullm_dist.llm.pieces.values import FILES_ALLOWED, values_in_files
from aullm_dist.llm.pieces.walk import holders_of, owners
from aullm_dist.llm.quantization import BLOCK, is_packed, pack, packed_parameter, state_of, stored_state
from aullm_dist.llm.stored.conversion import Values
from aullm_dist.llm.stored.weight_files import WeightFiles
from aullm_dist.llm.stored.wrappers import open_base
from aullm_dist.log import is_main_process

WEIGHTS_AT_ONCE = 2**22
"""Weights packed at a time: on CPU bitsandbytes needs some 20 bytes for each meanwhile. Whole blocks."""
_SHOW_PROGRESS_FROM_BYTES = 2**30


def load_in_pieces(
    source: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    placement: Placement,
    quantization: BitsAndBytesConfig | None = None,
    stored_in_nf4: bool = False,
    options: dict | None = None,
    pack_experts: bool = False,
) -> PreTrainedModel:
    """Return the causal LM in eval mode, its decoder placed, its vocabulary head left out.

    Every process calls it with the same arguments.

    Args:
        source: local folder with safetensors files.
        config: the model's config.
        dtype: dtype of weights that are not quantised, and in which others are before they are.
        placement: how the processes share the weights.
        quantization: how linear layers are packed; None leaves them as they are.
        stored_in_nf4: whether the files hold packed weights already.
        options: more for `from_config`, such as `attn_implementation`.
        pack_experts: whether fused experts are packed as well; files hold them unpacked.

    Raises:
        UserError: a file or a weight is missing, has another shape than the model, or is not finite.
    """
    files = placement.together(lambda: open_base(source, config))
    model = model_without_storage(config, dtype, quantization, files if stored_in_nf4 else None, options)
    if pack_experts:
        put_packed_experts(model)
    if quantization is not None:
        mark_quantized(model)
        model.config.quantization_config = quantization
    values = placement.together(lambda: values_in_files(model, files, source))
    dtypes = dtypes_of(model, dtype)
    # Before any weight is there: the library's function would draw those of a module again.
    fill_buffers(model, placement.device)
    load_buffers(model, values, files, dtypes, placement.device)
    total = sum(found.nbytes for found in values.values())
    holders = holders_of(model)
    not_finite = []
    with progress("Loading the LLM", total) as bar:
        for full, parameter_name, module in list(owners(model)):
            before = files.bytes_read
            load = _load_packed if packed_shape(module, parameter_name) is not None else _load_plain
            own = dtypes[full]
            parameter = load(module, parameter_name, values[full], files, own, placement, quantization)
            if not holds_finite(parameter, *piece_of(parameter.numel(), placement.rank, placement.world_size)):
                not_finite.append(full)
            for holder, name in holders[module._parameters[parameter_name]]:
                holder.register_parameter(name, parameter)
            placement.settle(parameter)
            bar.update((files.bytes_read - before) * placement.world_size)
    files.close()
    placement.together(lambda: refuse_not_finite(source, not_finite))
    return model.eval()


def _load_plain(
    module: nn.Module,
    name: str,
    found: Values,
    files: WeightFiles,
    dtype: torch.dtype,
    placement: Placement,
    _: object,
) -> nn.Parameter:
    shape = getattr(module, name).shape
    flat = _own_piece(shape.numel(), dtype, placement, functools.partial(found.read, files))
    return nn.Parameter(flat[: shape.numel()].view(shape), requires_grad=False)


def _own_piece(numel: int, dtype: torch.dtype, placement: Placement, fill: Callable[[int, int], Tensor]) -> Tensor:
    """Return flat values, padded to equal pieces, of which this process's piece is filled.

    The rest is address space that nothing was written to, so on CPU it takes no memory.
    """
    size = -(-numel // placement.world_size)
    flat = torch.empty(size * placement.world_size, dtype=dtype, device=placement.device)
    first, last = piece_of(numel, placement.rank, placement.world_size)
    if last > first:
        flat[first:last] = fill(first, last).to(device=placement.device, dtype=dtype)
    return flat


def _load_packed(
    module: Any,
    name: str,
    found: Values,
    files: WeightFiles,
    dtype: torch.dtype,
    placement: Placement,
    quantization: BitsAndBytesConfig | None,
) -> nn.Parameter:
    assert quantization is not None, "a packed layer is one that was to be packed"
    shape = packed_shape(module, name)
    assert shape is not None, "a packed parameter has a shape"
    if found.shape == tuple(shape):
        flat, numel, state = quantise_piece(found, files, dtype, placement, quantization)
    else:
        stored = found.stored
        assert stored is not None, "packed weights are never put together from several"
        storage = files[stored].dtype
        numel = files[stored].numel
        flat = _own_piece(numel, storage, placement, lambda a, b: files.read(stored, a, b))
        state = _stored_state(stored, files, placement)
    return packed_parameter(flat[:numel], state, module if is_packed(module, name) else None)


def quantise_piece(
    found: Values,
    files: WeightFiles,
    dtype: torch.dtype,
    placement: Placement,
    quantization: BitsAndBytesConfig,
) -> tuple[Tensor, int, Any]:
    """Return flat packed values with this process's piece filled, their number, and the state of the whole weight.

    Args:
        found: the weight in the files.
        files, dtype, placement, quantization: see `load_in_pieces`.
    """
    storage = quantization.bnb_4bit_quant_storage
    weights = found.numel
    per_element = 2 * storage.itemsize  # weights in one element of the storage dtype
    constants = torch.zeros(-(-weights // BLOCK), dtype=torch.float32, device=placement.device)

    def pack_piece(first: int, last: int) -> Tensor:
        # Whole blocks around the piece; what a neighbour packs as well is cut off again.
        begin = first * per_element // BLOCK * BLOCK
        end = min(-(-last * per_element // BLOCK) * BLOCK, weights)
        packed = torch.empty(-(-(end - begin) // per_element), dtype=storage, device=placement.device)
        for start in range(begin, end, WEIGHTS_AT_ONCE):
            values = found.read(files, start, min(start + WEIGHTS_AT_ONCE, end))
            part, scales = pack(values.to(device=placement.device, dtype=dtype), quantization)
            packed[(start - begin) // per_element :][: len(part)] = part
            constants[start // BLOCK :][: len(scales)] = scales
        offset = first - begin // per_element
        return packed[offset : offset + last - first]

    numel = -(-weights // per_element)
    flat = _own_piece(numel, storage, placement, pack_piece)
    return flat, numel, state_of(placement.largest(constants), torch.Size(found.shape), dtype, quantization)


def _stored_state(stored: str, files: WeightFiles, placement: Placement) -> Any:
    """Return the quantisation state of a packed weight, each process reading its piece of the constants."""
    parts = {}
    for key in (name for name in files.tensors if name.startswith(f"{stored}.")):
        entry = files[key]
        flat = _own_piece(entry.numel, entry.dtype, placement, functools.partial(files.read, key))
        placement.complete(flat, len(flat) // placement.world_size)
        parts[key.removeprefix(f"{stored}.")] = flat[: entry.numel].view(entry.shape)
    try:
        return stored_state(parts, placement.device)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{files[stored].file}: the quantisation state of {stored} is incomplete; {FILES_ALLOWED}"
        ) from error


def progress(description: str, total_bytes: int) -> tqdm:
    """Return a bar in bytes with the time that is left; it stays hidden where there is little to wait for."""
    return tqdm(
        total=total_bytes,
        desc=description,
        unit="B",
        unit_scale=True,
        disable=total_bytes < _SHOW_PROGRESS_FROM_BYTES or not is_main_process(),
        mininterval=0.5,
        dynamic_ncols=True,
    )
