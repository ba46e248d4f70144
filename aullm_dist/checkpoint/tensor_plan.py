"""Plans which file and key hold each parameter and buffer of a model, for saving and loading alike.

A model that can be checkpointed is an `nn.Module` (the plain one, not its DDP or engine wrapper), with optionally
- `adapter_prefix: str`: the name below which the LLM sits, "reasoner.llm" say. Frozen weights below it
  are never written.
- `peft_model() -> nn.Module | None`: the LLM at `adapter_prefix`; wrapped by PEFT if it has an adapter.
A model without an LLM needs neither.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER_FILE = "adapter_model.safetensors"
MODULES_FILE = "aullm_modules.safetensors"


@dataclass(kw_only=True, slots=True)
class PlannedTensor:
    """A tensor of the model and its place in a checkpoint."""

    name: str
    """Name in `model.named_parameters()` or `named_buffers()`."""
    file: str
    key: str
    """Name inside `file`; differs from `name` for adapter tensors, which follow PEFT."""
    tensor: Tensor
    trainable: bool
    is_parameter: bool


def plan_tensors(model: nn.Module) -> list[PlannedTensor]:
    """List everything of `model` that a checkpoint holds, in the order of `named_parameters`, then the buffers.

    The adapter goes to ADAPTER_FILE. To MODULES_FILE go all other trainables, and whatever else lies outside the LLM:
    frozen parameters and persistent buffers of our own modules cannot be had from anywhere else.
    """
    prefix = _llm_prefix(model)
    adapter_keys = adapter_key_by_name(model)
    plan = []
    for name, param in model.named_parameters():
        if name in adapter_keys:
            place = (ADAPTER_FILE, adapter_keys[name])
        elif param.requires_grad or not _is_below(name, prefix):
            place = (MODULES_FILE, name)
        else:
            continue
        plan.append(
            PlannedTensor(
                name=name, file=place[0], key=place[1], tensor=param, trainable=param.requires_grad, is_parameter=True
            )
        )
    for name, buffer in _persistent_buffers(model):
        if not _is_below(name, prefix):
            plan.append(
                PlannedTensor(
                    name=name, file=MODULES_FILE, key=name, tensor=buffer, trainable=False, is_parameter=False
                )
            )
    return plan


def adapter_key_by_name(model: nn.Module) -> dict[str, str]:
    """Map each adapter parameter of `model` to its key in a PEFT adapter file; empty if the model has no PeftModel.

    PEFT itself gives the keys. It is asked with empty stand-ins for the tensors, so nothing of the base is collected,
    copied or gathered. Where the wrapped LLM has no language-model head (`AutoModel` instead of
    `AutoModelForCausalLM`), the keys are those that the adapter has on the model with the head, because that is what
    users load.
    """
    peft_model = peft_model_of(model)
    if peft_model is None:
        return {}
    from peft import get_peft_model_state_dict

    adapter = active_adapter(peft_model)
    stand_ins = {name: torch.empty(0) for name, _ in peft_model.named_parameters()}
    name_by_identity = {id(stand_in): name for name, stand_in in stand_ins.items()}
    # save_embedding_layers=False also keeps PEFT from asking the hub for the base model's config.
    keys = get_peft_model_state_dict(
        peft_model, state_dict=stand_ins, adapter_name=adapter, save_embedding_layers=False
    )
    prefix = _llm_prefix(model)
    head_prefix = _missing_head_prefix(peft_model)
    return {
        f"{prefix}.{name_by_identity[id(stand_in)]}": _with_head_prefix(key, head_prefix)
        for key, stand_in in keys.items()
    }


def peft_model_of(model: nn.Module) -> Any | None:
    """Return the model's PeftModel, None if it has no LLM or an LLM without LoRA.

    Raises:
        TypeError: If the PeftModel is not the module at `adapter_prefix`.
    """
    give = getattr(model, "peft_model", None)
    llm = give() if give is not None else None
    if llm is None:
        return None
    from peft import PeftModel

    if not isinstance(llm, PeftModel):
        return None
    prefix = _llm_prefix(model) or ""
    if model.get_submodule(prefix) is not llm:
        raise TypeError(f"adapter_prefix is {prefix!r}, but peft_model() returns another module")
    return llm


def active_adapter(peft_model: Any) -> str:
    """Return the name of the one adapter that is trained.

    Raises:
        TypeError: If several are active.
    """
    names = peft_model.active_adapters
    if len(names) != 1:
        raise TypeError(f"one active LoRA adapter is expected, the model has {list(names)}")
    return names[0]


def _llm_prefix(model: nn.Module) -> str | None:
    return getattr(model, "adapter_prefix", None) or None


def _is_below(name: str, prefix: str | None) -> bool:
    return prefix is not None and name.startswith(f"{prefix}.")


def _missing_head_prefix(peft_model: Any) -> str:
    """Return the attribute under which `AutoModelForCausalLM` keeps this LLM, empty if the LLM has its head."""
    llm = peft_model.get_base_model()
    if not hasattr(llm, "get_output_embeddings") or llm.get_output_embeddings() is not None:
        return ""
    return getattr(llm, "base_model_prefix", "")


def _with_head_prefix(key: str, head_prefix: str) -> str:
    wrapper = "base_model.model."
    return f"{wrapper}{head_prefix}.{key.removeprefix(wrapper)}" if head_prefix else key


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield (f"{module_name}.{name}" if module_name else name), buffer
