"""Finds the decoder's layers: the unit that activation checkpointing recomputes and ZeRO-3 gathers."""

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every decoder layer."""
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield name, module


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of everything that holds a weight matrix for each of several experts."""
    for module_name, module in model.named_modules():
        if isinstance(module, _ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            # ZeRO-3 leaves a parameter without its shape.
            if len(getattr(parameter, "ds_shape", parameter.shape)) == 3:
                yield f"{module_name}.{name}", parameter


def checkpoint_activations(model: PreTrainedModel, *, reentrant: bool) -> None:
    """Recompute every decoder layer in the backward pass."""
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    # The reentrant kind needs inputs that require grad: the soft tokens bring that, so words need not, frozen as they
    # are. The hook would cost a gradient of every word.
    model.disable_input_require_grads()
