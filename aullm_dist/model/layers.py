"""The decoder's layers: what activation checkpointing computes anew, and ZeRO-3 gathers, as one."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer


def decoder_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of every decoder layer."""
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield name, module


def checkpoint_activations(model: PreTrainedModel, *, reentrant: bool) -> None:
    """Let every decoder layer be computed anew in the backward pass."""
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    # The reentrant kind needs inputs that require grad: the soft tokens bring that, so words need not, frozen as they
    # are. The hook would cost a gradient of every word.
    model.disable_input_require_grads()
