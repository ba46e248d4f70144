"""Loads an LLM in pieces: every process reads and quantises its own part of each weight, none holds a copy of all.

The model is built without storage. Parameter after parameter, each process reads its share of the flat values, packs it
to NF4 if it is a quantised weight, and hands it to the `Placement`: that leaves it partitioned (ZeRO-3), or completes
it on the device from what the others read (DDP, ZeRO-1 and -2). Over all processes the checkpoint is read once.

Bit for bit the result is bitsandbytes' own: NF4 blocks of 64 weights are independent of each other, and the constants
that describe them are put together before they are quantised in turn.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.pytorch_utils import Conv1D

from aullm_dist.errors import UserError
from aullm_dist.library_errors import refusing
from aullm_dist.llm.base_check import holds_finite, refuse_not_finite
from aullm_dist.llm.blame import key_refusal
from aullm_dist.llm.bypassed import bypassed_layers, left_plain, shared_layers
from aullm_dist.llm.experts import packed_shape, put_packed_experts
from aullm_dist.llm.quantization import (
    BLOCK,
    is_packed,
    pack,
    packed_parameter,
    put_packed_layers,
    state_of,
    stored_state,
)
from aullm_dist.llm.stored.conversion import Values, as_stored, find_values
from aullm_dist.llm.stored.weight_files import StoredTensor, WeightFiles
from aullm_dist.llm.stored.wrappers import open_base
from aullm_dist.log import is_main_process

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


class Alone:
    """The placement of one process for itself."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def together(self, work: Callable[[], T]) -> T:
        """Run `work`."""
        return work()

    def largest(self, values: Tensor) -> Tensor:
        """Return `values`, which nobody else has."""
        return values

    def complete(self, flat: Tensor, size: int) -> None:
        """Leave what is complete."""

    def settle(self, parameter: nn.Parameter) -> None:
        """Leave what is complete."""


class NeverCalled(nn.Module):
    """Stands where the vocabulary head would: no logits over the vocabulary are ever computed."""

    def __init__(self) -> None:
        super().__init__()
        # Some library functions that fill a model anew ask any head for them.
        self.weight, self.bias = torch.empty(1, 1, device="meta"), None

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
    # Before any weight is there: the library's function would draw those of a module anew.
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


def holders_of(model: nn.Module) -> dict[nn.Parameter | None, list[tuple[nn.Module, str]]]:
    """Return the modules that have each parameter, with its name there: shared blocks have the same ones."""
    found: dict[nn.Parameter | None, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(parameter, []).append((module, name))
    return found


def mark_quantized(model: PreTrainedModel) -> None:
    """Mark a model as the library marks what it has quantised itself: modelling code goes other ways then."""
    marked: Any = model
    marked.is_quantized = marked.is_loaded_in_4bit = True
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            setattr(module.config, "_is_quantized", True)  # noqa: B010 - the library's own, which its types do not have


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

    Raises:
        UserError: the library builds no such model, or cannot run it with what is packed in the files.
    """
    model = build_without_storage(config, dtype=dtype, **(options or {}))
    head = model.get_output_embeddings()
    model.set_output_embeddings(NeverCalled())
    if quantization is not None:
        put_packed_layers(
            model, quantization, stored=packed_files is not None, plain=_plain_layers(model, packed_files)
        )
    if keep_head:
        model.set_output_embeddings(head)
    return model


def build_without_storage(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Return the library's own causal LM on the meta device; `options` are those of `from_config`.

    Raises:
        UserError: the library builds no model of the config; names the key where it is known.
    """

    def make(values: dict[str, Any]) -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(type(config).from_dict(values), **options)

    def refused(error: BaseException) -> UserError:
        return key_refusal(config.name_or_path or config.model_type, "config.json", error, config.to_dict(), make)

    with refusing(refused), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    return model


def _plain_layers(model: PreTrainedModel, packed_files: WeightFiles | None) -> list[str]:
    """Return the linear layers that stay unpacked: a publisher's in packed files, else those used past the layer."""
    if packed_files is None:
        return left_plain(model)
    prefix = f"{model.base_model_prefix}."
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not any(f"{key}.weight.absmax" in packed_files for key in (name, name.removeprefix(prefix)))
    ]
    if spoiled := sorted({*bypassed_layers(model), *shared_layers(model)}.difference(plain)):
        raise UserError(
            f"backbone {packed_files.folder}: {spoiled[0]} is in NF4, but {model.config.model_type} uses its weight "
            "past the layer as well; allowed: files that aullm-dist quantize wrote, or the LLM as it was before"
        )
    return plain


def dtypes_of(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype of every parameter and kept buffer: a few, such as a router's bias, keep one of their own.

    Args:
        model: the causal LM on the meta device, made in `dtype`.
        dtype: of what has none of its own.

    Source: transformers.PreTrainedModel._get_dtype_plan, and how its loading applies it.
    """
    plan = model._get_dtype_plan(dtype)
    pattern, by_group, _ = build_glob_alternation(list(plan)) if plan else (None, {}, None)
    found = {}
    for full, name, module in (*owners(model), *kept_buffers(model)):
        match = None if pattern is None else pattern.search(full)
        if match is not None and match.lastgroup is not None:
            found[full] = plan[by_group[match.lastgroup]]
        else:
            # The layers put in for packed ones are made in float32, whatever becomes of their biases.
            found[full] = dtype if type(module).__name__ == "Linear4bit" else getattr(module, name).dtype
    return found


def kept_buffers(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (full name, name, module) of every buffer that a model keeps in its files."""
    for module_name, module in model.named_modules():
        for name, _ in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{module_name}.{name}" if module_name else name, name, module


def load_buffers(
    model: PreTrainedModel,
    values: Mapping[str, Values],
    files: WeightFiles,
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
) -> None:
    """Read the buffers that a model keeps in its files, whole and on every process: they are a few values per layer."""
    for full, name, module in list(kept_buffers(model)):
        found = values[full]
        read = found.read(files, 0, found.numel).view(found.shape)
        module._buffers[name] = read.to(device=device, dtype=dtypes[full])


def owners(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (full name, name, module) of every parameter once, in the order of the forward pass."""
    seen = set()
    for module_name, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in seen:
                seen.add(parameter)
                yield f"{module_name}.{name}" if module_name else name, name, module


def values_in_files(
    model: PreTrainedModel, files: WeightFiles | Mapping[str, StoredTensor], source: str
) -> dict[str, Values]:
    """Return where every parameter and kept buffer stands, after checking that all are there in the right shape.

    Raises:
        UserError: a weight is missing, has another shape, or is of whole numbers.
    """
    found = find_values(model, files)
    # Of weights that are tied, the files may hold either.
    tied = {other: name for name, other in model.all_tied_weights_keys.items()}
    head = model.get_output_embeddings()
    needed: dict[str, Values] = {}
    missing, mismatched, whole = [], [], []
    for full, name, module in (*owners(model), *kept_buffers(model)):
        values = found.get(full)
        if values is None and (other := tied.get(full, full)) in files:
            values = as_stored(other, files[other])
        if values is None:
            # The head may lack, as it is never called.
            missing += [full] if module is not head else []
        elif not _fits(module, name, values):
            there = values.problem or f"{list(values.shape)} there"
            mismatched.append(f"{full} ({there}, {list(getattr(module, name).shape)} by config.json)")
        else:
            needed[full] = values
            if not (_holds_numbers(values, files) or _may_be_whole(module, name, values)):
                whole.append(full)
    for what, keys in (("missing in", missing), ("of another shape in", mismatched), ("whole numbers in", whole)):
        if keys:
            raise UserError(f"backbone {source}: {len(keys)} weights are {what} its files, first {keys[0]}; {_ALLOWED}")
    return needed


def _holds_numbers(values: Values, files: WeightFiles | Mapping[str, StoredTensor]) -> bool:
    return all(files[stored].dtype.is_floating_point for stored in {run.stored for run in values.runs})


def _may_be_whole(module: Any, name: str, values: Values) -> bool:
    """Return whether what stands in the files is packed weights, or a buffer that counts something."""
    if name in module._buffers:
        return not module._buffers[name].is_floating_point()
    return is_packed(module, name) and values.shape != (module.out_features, module.in_features)


def _fits(module: Any, name: str, found: Values) -> bool:
    if not is_packed(module, name):
        return tuple(getattr(module, name).shape) == found.shape
    shape = (module.out_features, module.in_features)
    return bool(found.shape == shape or (found.whole and found.nbytes == -(-shape[0] * shape[1] // 2)))


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
            f"{files[stored].file}: the quantisation state of {stored} is incomplete; {_ALLOWED}"
        ) from error


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute buffers that no file holds, rotary frequencies for one, as the library does after loading.

    Some models fill the buffers of their layers from outside, so the library's function sees every module that has one
    somewhere below it. What it would draw for parameters goes nowhere, as these have no storage yet.

    Raises:
        UserError: the library fails on a setting of config.json.
    """
    filled = set()
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module._buffers[name] = torch.empty_like(buffer, device=device)
                filled.add(module)
    _initialise(model, model, filled)


def _initialise(module: nn.Module, owner: PreTrainedModel, filled: set[nn.Module]) -> None:
    """Call the library's function on modules with filled buffers, from the inside out, each by the model it is part of.

    Source: transformers.PreTrainedModel.initialize_weights.
    """
    for child in module.children():
        if not filled.isdisjoint(child.modules()):
            _initialise(child, child if isinstance(child, PreTrainedModel) else owner, filled)
    with refusing(functools.partial(key_refusal, str(owner.config.name_or_path), "config.json")):
        owner._init_weights(module)


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
