"""Finds linear layers that NF4 must leave alone: whose weights are used past the layer, or are not theirs alone.

Some routers and Mamba mixers multiply with `self.proj.weight` and never call `self.proj`. Which ones do is a property
of the library's code, so it is watched where it runs: on the architecture at tiny size, as the probe of the packed step
builds it (`packing.shrink`). Other layers are one weight in several places (Zamba's shared blocks), which packing would
make as many, and gpt2's are stored the other way round.
"""

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from aullm_dist.library_errors import LIBRARY_ERRORS
from aullm_dist.packing.forward import decoder_of
from aullm_dist.packing.hybrids import carry_states
from aullm_dist.packing.probe import TooSlow, quietly
from aullm_dist.packing.shrink import VOCAB, KeyedConfig, shrink

_TOKENS = 12


def left_plain(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers of a causal LM that NF4 must leave alone.

    Args:
        model: on any device; its weights are not looked at, but which of them are the same.
    """
    turned = [name for name, module in model.named_modules() if isinstance(module, Conv1D)]
    return [*bypassed_layers(model), *shared_layers(model), *turned]


def shared_layers(model: nn.Module) -> dict[str, str]:
    """Return the linear layers whose weight is another's as well, each with the first of those that have it."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        # A packed weight is always its layer's own.
        if type(module) is nn.Linear:
            other = first.setdefault(id(module.weight), name)
            if other != name:
                found |= {other: other, name: other}
    return found


def bypassed_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of linear layers of a causal LM whose weights its own code uses past the layer.

    Args:
        model: on any device; its weights are not looked at.
    """
    if type(model.config) not in AutoModelForCausalLM._model_mapping:
        return []  # code of its own is not built at tiny size
    try:
        kinds = _watched(KeyedConfig(shrink(model.config)))
    except (*LIBRARY_ERRORS, TooSlow):
        # What cannot be built small runs as it always did.
        return []
    return [name for name, place in _places(model) if place in kinds]


def leaving_plain(quantization: BitsAndBytesConfig, model: PreTrainedModel) -> BitsAndBytesConfig:
    """Return the settings of a quantisation with the names of the layers that the library must not pack.

    Args:
        quantization: from `quantization.nf4_config`.
        model: the causal LM, on any device.
    """
    if plain := left_plain(model):
        head = model.get_output_embeddings()
        heads = [name for name, module in model.named_modules() if module is head]
        quantization = copy.deepcopy(quantization)
        quantization.llm_int8_skip_modules = [*heads, *plain]
    return quantization


@functools.lru_cache(maxsize=64)
def _watched(small: KeyedConfig) -> frozenset[tuple[str, str]]:
    """Return (class that holds the layer, the layer's name there) of every layer that a forward pass bypasses."""
    with quietly(), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(small.config, dtype=torch.float32, attn_implementation="eager")
        decoder = decoder_of(model)
        carry_states(decoder)
        seen: set[str] = set()
        for name, module in decoder.named_modules():
            if type(module) is nn.Linear:
                module.__class__ = _Watched
                vars(module)["_seen"], vars(module)["_name"] = seen, name
        ids = torch.randint(3, VOCAB, (1, _TOKENS))
        for training in (True, False):
            decoder.train(training)
            decoder(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False)
        places = dict(_places(decoder))
        return frozenset(places[name] for name in seen)


def _places(model: nn.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the name of every linear layer, with its class's and its own name."""
    for parent_name, parent in model.named_modules():
        for name, module in parent.named_children():
            if isinstance(module, nn.Linear):
                yield f"{parent_name}.{name}" if parent_name else name, (type(parent).__name__, name)


class _Watched(nn.Linear):
    """A linear layer that notes when somebody else asks for its weight."""

    _seen: set[str]
    _name: str

    @property
    def weight(self) -> Tensor:  # type: ignore[override] # a parameter, as seen from outside
        """Return the weight, and note that it was asked for."""
        self._seen.add(self._name)
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def forward(self, input: Tensor) -> Tensor:
        """Compute the layer without asking for its weight in that way."""
        weight = self._parameters["weight"]
        assert weight is not None
        return functional.linear(input, weight, self._parameters["bias"])
