"""Finds every weight of a model in its files, and refuses files in which one is missing or of another shape."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from aullm_dist.errors import UserError
from aullm_dist.llm.pieces.walk import kept_buffers, owners
from aullm_dist.llm.quantization import is_packed
from aullm_dist.llm.stored.conversion import Values, as_stored, find_values
from aullm_dist.llm.stored.weight_files import StoredTensor, WeightFiles

FILES_ALLOWED = "allowed: files that hold every weight of config.json's model under its own name"


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
            raise UserError(
                f"backbone {source}: {len(keys)} weights are {what} its files, first {keys[0]}; {FILES_ALLOWED}"
            )
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
