"""Loading an LLM in pieces: every process reads and quantises its own part of each weight, none holds a copy of all.

The model is built without storage. Parameter after parameter, each process reads its share of the flat values, packs it
to NF4 if it is a quantised weight, and hands it to the `Placement`: that leaves it divided (ZeRO-3), or completes it on
the device from what the others read (DDP, ZeRO-1 and -2). Over all processes the checkpoint is read once.

Bit for bit the result is bitsandbytes' own: NF4 blocks of 64 weights are independent of each other, and the constants
that describe them are put together before they are quantised in turn.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

from aullm_dist.errors import UserError
from aullm_dist.log import is_main_process
from aullm_dist.model.quantization import (
    BLOCK,
    is_packed,
    pack,
    packed_parameter,
    put_packed_layers,
    state_of,
    stored_state,
)
from aullm_dist.model.weight_files import StoredTensor, WeightFiles

T = TypeVar("T")
WEIGHTS_AT_ONCE = 2**22
"""Weights packed at a time: on CPU bitsandbytes needs some 20 bytes for each meanwhile. Whole blocks."""
_ALLOWED = "allowed: files that hold every weight of config.json's model under its own name"
_SHOW_PROGRESS_FROM_BYTES = 2**30


class Placement(Protocol):
    """How the processes of a run share what they load."""

    rank: int
    world_size: int
    device: torch.device

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every process and return its result; if it raises a UserError on any, raise it on all."""

    def largest(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum of `values` over all processes, in place."""

    def complete(self, flat: Tensor, size: int) -> None:
        """Fill flat values `[world_size * size]` of which each process has its piece of `size`, on every process."""

    def settle(self, parameter: nn.Parameter) -> None:
        """Take over a parameter of which each process has filled its piece (see `piece_of`)."""


class NeverCalled(nn.Module):
    """Stands where the vocabulary head would: no logits over the vocabulary are ever computed."""

    def forward(self, *_: object) -> Tensor:
        """Fail: a caller of the head is a mistake of ours."""
        raise AssertionError("the vocabulary head is not loaded")


def piece_of(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return first and last (not included) of `numel` elements that are a process's; equal sizes but for the end."""
    size = -(-numel // world_size)
    return min(rank * size, numel), min((rank + 1) * size, numel)


def load_in_pieces(
    source: str,
    config: PretrainedConfig,
    dtype: torch.dtype,
    placement: Placement,
    quantization: BitsAndBytesConfig | None = None,
    stored_in_nf4: bool = False,
    options: dict | None = None,
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

    Raises:
        UserError: a file or a weight is missing, or has another shape than the model.
    """
    files = placement.together(lambda: WeightFiles(source))
    model = model_without_storage(config, dtype, quantization, files if stored_in_nf4 else None, options)
    if quantization is not None:
        model.is_quantized = model.is_loaded_in_4bit = True
        model.config.quantization_config = quantization
    placement.together(lambda: refuse_special(model, source))
    # Before any weight is there: the library's function would draw those of a module anew.
    fill_buffers(model, placement.device)
    names = placement.together(lambda: names_in_files(model, files, source))
    total = sum(files[name].nbytes for name in names.values())
    with progress("Loading the LLM", total) as bar:
        for full, parameter_name, module in owners(model):
            before = files.bytes_read
            load = _load_packed if is_packed(module, parameter_name) else _load_plain
            parameter = load(module, parameter_name, names[full], files, dtype, placement, quantization)
            module.register_parameter(parameter_name, parameter)
            placement.settle(parameter)
            bar.update((files.bytes_read - before) * placement.world_size)
    files.close()
    return model.eval()


def model_without_storage(
    config: PretrainedConfig,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
    packed_files: WeightFiles | None = None,
    options: dict | None = None,
    keep_head: bool = False,
) -> PreTrainedModel:
    """Return the causal LM on the meta device, its linear layers replaced by NF4 layers if they are to be packed.

    Args:
        config, dtype, quantization, options: see `load_in_pieces`.
        packed_files: files that hold packed weights already: they say which layers are packed.
        keep_head: whether the vocabulary head stays; it is never packed.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **(options or {}))
    head = model.get_output_embeddings()
    model.set_output_embeddings(NeverCalled())
    if quantization is not None:
        put_packed_layers(
            model, quantization, stored=packed_files is not None, plain=_plain_layers(model, packed_files)
        )
    if keep_head:
        model.set_output_embeddings(head)
    return model


def _plain_layers(model: PreTrainedModel, packed_files: WeightFiles | None) -> list[str]:
    """Return the linear layers that a publisher left unpacked in files that hold packed weights."""
    if packed_files is None:
        return []
    prefix = f"{model.base_model_prefix}."
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and not any(f"{key}.weight.absmax" in packed_files for key in (name, name.removeprefix(prefix)))
    ]


def refuse_special(model: PreTrainedModel, source: str) -> None:
    """Refuse by name what the library does for some models while it loads and this module does not.

    Raises:
        UserError: the model has persistent buffers, or weights that stay in float32 whatever the others are.
    """
    kept = [
        name
        for module_name, module in model.named_modules()
        for name, _ in module.named_buffers(prefix=module_name, recurse=False)
        if name.rpartition(".")[2] not in module._non_persistent_buffers_set
    ]
    what = ""
    if kept:
        what = f"keeps buffers in its files, first {kept[0]}"
    elif getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None):
        what = "keeps some of its weights in float32"
    if what:
        raise UserError(
            f"backbone {source}: model type {model.config.model_type} {what}, which cannot be read in pieces; "
            "allowed: a training run in one process, or another backbone"
        )


def owners(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (full name, name, module) of every parameter once, in the order of the forward pass."""
    seen = set()
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in seen:
                seen.add(parameter)
                yield f"{module_name}.{name}" if module_name else name, name, module


def names_in_files(
    model: PreTrainedModel, files: WeightFiles | Mapping[str, StoredTensor], source: str
) -> dict[str, str]:
    """Map the model's parameter names to those in the files, after checking that all are there in the right shape.

    Raises:
        UserError: a weight is missing or has another shape.
    """
    prefix = f"{model.base_model_prefix}."
    names, missing, mismatched = {}, [], []
    for full, name, module in owners(model):
        # A checkpoint of the decoder alone has its names without the prefix.
        stored = next((key for key in (full, full.removeprefix(prefix)) if key in files), None)
        if stored is None:
            missing.append(full)
        elif not _fits(module, name, files[stored]):
            mismatched.append(full)
        else:
            names[full] = stored
    for what, keys in (("missing in", missing), ("of another shape in", mismatched)):
        if keys:
            raise UserError(f"backbone {source}: {len(keys)} weights are {what} its files, first {keys[0]}; {_ALLOWED}")
    return names


def _fits(module: nn.Module, name: str, stored: StoredTensor) -> bool:
    if not is_packed(module, name):
        return tuple(getattr(module, name).shape) == stored.shape
    shape = (module.out_features, module.in_features)
    return stored.shape == shape or stored.nbytes == -(-shape[0] * shape[1] // 2)


def _load_plain(
    module: nn.Module, name: str, stored: str, files: WeightFiles, dtype: torch.dtype, placement: Placement, _: object
) -> nn.Parameter:
    shape = getattr(module, name).shape
    flat = _own_piece(shape.numel(), dtype, placement, lambda a, b: files.read(stored, a, b))
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
    module: nn.Module,
    name: str,
    stored: str,
    files: WeightFiles,
    dtype: torch.dtype,
    placement: Placement,
    quantization: BitsAndBytesConfig,
) -> nn.Parameter:
    shape = torch.Size((module.out_features, module.in_features))
    if files[stored].shape == tuple(shape):
        flat, numel, state = quantise_piece(shape, stored, files, dtype, placement, quantization)
    else:
        storage = files[stored].dtype
        numel = files[stored].numel
        flat = _own_piece(numel, storage, placement, lambda a, b: files.read(stored, a, b))
        state = _stored_state(stored, files, placement)
    return packed_parameter(flat[:numel], state, module)


def quantise_piece(
    shape: torch.Size,
    stored: str,
    files: WeightFiles,
    dtype: torch.dtype,
    placement: Placement,
    quantization: BitsAndBytesConfig,
) -> tuple[Tensor, int, object]:
    """Return flat packed values with this process's piece filled, their number, and the state of the whole weight.

    Args:
        shape: of the weight.
        stored: its name in the files.
        files, dtype, placement, quantization: see `load_in_pieces`.
    """
    storage = quantization.bnb_4bit_quant_storage
    weights = shape.numel()
    per_element = 2 * storage.itemsize  # weights in one element of the storage dtype
    constants = torch.zeros(-(-weights // BLOCK), dtype=torch.float32, device=placement.device)

    def pack_piece(first: int, last: int) -> Tensor:
        # Whole blocks around the piece; what a neighbour packs as well is cut off again.
        begin = first * per_element // BLOCK * BLOCK
        end = min(-(-last * per_element // BLOCK) * BLOCK, weights)
        packed = torch.empty(-(-(end - begin) // per_element), dtype=storage, device=placement.device)
        for start in range(begin, end, WEIGHTS_AT_ONCE):
            values = files.read(stored, start, min(start + WEIGHTS_AT_ONCE, end))
            part, scales = pack(values.to(device=placement.device, dtype=dtype), quantization)
            packed[(start - begin) // per_element :][: len(part)] = part
            constants[start // BLOCK :][: len(scales)] = scales
        offset = first - begin // per_element
        return packed[offset : offset + last - first]

    numel = -(-weights // per_element)
    flat = _own_piece(numel, storage, placement, pack_piece)
    return flat, numel, state_of(placement.largest(constants), shape, dtype, quantization)


def _stored_state(stored: str, files: WeightFiles, placement: Placement) -> object:
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
            f"{files[stored].file}: the quantisation state of {stored} is incomplete; {_ALLOWED}"
        ) from error


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute buffers that no file holds, rotary frequencies for one, as the library does after loading."""
    for module in model.modules():
        on_meta = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in on_meta:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if on_meta:
            model._init_weights(module)


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
