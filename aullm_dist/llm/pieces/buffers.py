"""Fills the buffers of a model that was built without storage: read from its files, or computed as the library does."""

import functools
from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from aullm_dist.library_errors import refusing
from aullm_dist.llm.blame import key_refusal
from aullm_dist.llm.pieces.walk import kept_buffers
from aullm_dist.llm.stored.conversion import Values
from aullm_dist.llm.stored.weight_files import WeightFiles


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
