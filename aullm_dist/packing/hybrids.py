"""Runs recurrent layers on a packed row: every suffix starts from the state in which the prefix ends.

Linear attention, Mamba-2 and short convolutions remember what came before in a state of fixed size: a recurrent matrix
per head, and the last inputs of a short convolution. That state is all that a suffix can know of its prefix. So the
prefix runs through the layer once and leaves its state; the K suffixes run as K rows of a batch, each starting from it;
the outputs are joined in the order of the packed row. The same function as padded rows, gradients through the state
included, with the prefix computed once.

The interface is the one through which the library's own layers continue a text: a cache that is asked for a state and
handed the next one. `PrefixState` answers the same questions and keeps the tensors themselves, so autograd runs through
them; the library's caches copy values in place.

Letters: B rows, L = P + K*S tokens, K suffixes of S tokens behind P prefix tokens, D LLM width.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from aullm_dist.errors import UserError

_KEEPS_STATE = {"update_conv_state", "update_recurrent_state"}
_CACHE_NAMES = ("cache_params", "past_key_values")
_WITHOUT_EFFECT = ("position_ids",)
"""Tensors that layers pass to every mixer and that a recurrent one has no use for."""


class PrefixState:
    """The state of one recurrent layer, behind the interface of `transformers.Cache`.

    Args:
        conv: last inputs of each convolution, [B, channels, kernel size]; None before the first token.
        recurrent: each recurrent state, [B, ...]; None before the first token.
    """

    def __init__(self, conv: dict[int, Tensor] | None = None, recurrent: dict[int, Tensor] | None = None) -> None:
        self._conv = dict(conv or {})
        self._recurrent = dict(recurrent or {})

    @property
    def is_empty(self) -> bool:
        """Whether no layer left anything."""
        return not self._conv and not self._recurrent

    def spread(self, count: int) -> "PrefixState":
        """Return the state of `count` suffixes behind each row, each row's suffixes next to each other."""
        conv, recurrent = (
            {index: state.repeat_interleave(count, dim=0) for index, state in states.items()}
            for states in (self._conv, self._recurrent)
        )
        return PrefixState(conv, recurrent)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the last inputs of a convolution; None at the start of a text."""
        return self._conv.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return a recurrent state; None at the start of a text."""
        return self._recurrent.get(state_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        """Return whether there is anything to start from."""
        return state_idx in self._conv or state_idx in self._recurrent

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return False: nothing is ever rolled back."""
        return False

    def update_conv_state(
        self,
        conv_states: Tensor,
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **others: Any,
    ) -> Tensor:
        """Keep the last inputs of a convolution and return them all, those before the new ones included.

        Source: transformers.cache_utils.LinearAttentionLayer.update_conv_state.
        """
        before = self._conv.get(state_idx)
        if before is None:
            size = conv_kernel_size or conv_states.shape[-1]
            full = functional.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        else:
            size = before.shape[-1]
            full = torch.cat([before, conv_states], dim=-1)
        self._conv[state_idx] = full[..., full.shape[-1] - size :]
        return full

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **others: Any
    ) -> Tensor:
        """Keep a recurrent state and return it."""
        self._recurrent[state_idx] = recurrent_states
        return recurrent_states


class _Mixer:
    """Stands in the place of a recurrent module's `forward`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._name = type(module).__name__
        self._forward: Callable[..., Any] = module.forward
        self._names = list(inspect.signature(module.forward).parameters)
        self._cache = next(name for name in _CACHE_NAMES if name in self._names)
        self.layout: tuple[int, int] | None = None
        """(P, S) of the row that is about to come; None for rows of one text."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a packed row as its prefix and a batch of suffixes, or a row of one text as it is."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if self.layout is None:
            if given.get(self._cache) is None and self._module.training:
                # Without a cache Mamba's fused kernel multiplies with the weights of `out_proj` past the module, and so
                # past LoRA and NF4.
                given[self._cache] = PrefixState()
            return self._forward(**given)
        for name in _WITHOUT_EFFECT:
            given.pop(name, None)
        hidden = given.pop(self._names[0])
        given.pop(self._cache, None)
        odd = sorted(name for name, value in given.items() if isinstance(value, Tensor))
        if odd:
            raise UserError(
                f"packing: {self._name} gets {', '.join(odd)}, which cannot be split among suffixes; "
                "set model.packing=false"
            )
        return self._packed(hidden, given, *self.layout)

    def _packed(self, hidden: Tensor, given: dict[str, Any], prefix_tokens: int, suffix_tokens: int) -> Any:
        rows, length, width = hidden.shape
        count = (length - prefix_tokens) // suffix_tokens
        suffixes = hidden[:, prefix_tokens:].reshape(rows * count, suffix_tokens, width)
        if suffix_tokens == 1:
            # One token is taken for generation, in which states are written over in place; what follows has no effect.
            suffixes = functional.pad(suffixes, (0, 0, 0, 1))
        state = PrefixState()
        first = self._run(hidden[:, :prefix_tokens], given, state)
        if state.is_empty:
            raise UserError(f"packing: {self._name} leaves no state behind its prefix; set model.packing=false")
        others = self._run(suffixes, given, state.spread(count))
        if isinstance(first, Tensor):
            return _joined(first, others, rows, suffix_tokens)
        return tuple(_joined(*pair, rows, suffix_tokens) for pair in zip(first, others, strict=True))

    def _run(self, hidden: Tensor, given: dict[str, Any], state: PrefixState) -> Any:
        return self._forward(**{self._names[0]: hidden, self._cache: state}, **given)


def _joined(prefix: Tensor, suffixes: Tensor, rows: int, suffix_tokens: int) -> Tensor:
    """Return [B, P + K*S, ...] of a prefix's outputs [B, P, ...] and those of its suffixes [B*K, S or more, ...]."""
    kept = suffixes[:, :suffix_tokens]
    return torch.cat([prefix, kept.reshape(rows, -1, *kept.shape[2:])], dim=1)


def carry_states(decoder: nn.Module) -> None:
    """Make the recurrent layers of a decoder ready for packed rows; those of one text stay as they are.

    Args:
        decoder: with decoder layers that get `prefix_tokens` and `suffix_tokens` as keyword arguments.
    """
    if getattr(decoder, "_carries_states", False):
        return
    for layer in decoder.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            mixers: list[_Mixer] = []
            for module in _recurrent_modules(layer):
                # Layers may share a module (Zamba 2).
                if not isinstance(module.forward, _Mixer):
                    module.forward = _Mixer(module)
                mixers.append(module.forward)
            if mixers:
                # Inside of what activation checkpointing computes again, so that it holds there as well.
                layer.register_forward_pre_hook(_layout_setter(mixers), with_kwargs=True)
    vars(decoder)["_carries_states"] = True


def is_recurrent(decoder: nn.Module) -> bool:
    """Return whether any module of a decoder keeps a recurrent state."""
    return next(_recurrent_modules(decoder), None) is not None


def _layout_setter(mixers: list[_Mixer]) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    def set_layout(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        prefix_tokens = kwargs.get("prefix_tokens")
        for mixer in mixers:
            mixer.layout = None if prefix_tokens is None else (prefix_tokens, kwargs["suffix_tokens"])

    return set_layout


def _recurrent_modules(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that keep a state in a cache: their class calls the functions that do it."""
    for module in root.modules():
        takes_cache = any(name in inspect.signature(type(module).forward).parameters for name in _CACHE_NAMES)
        if takes_cache and _KEEPS_STATE & _names_used(type(module)):
            yield module


def _names_used(kind: type[nn.Module]) -> set[str]:
    methods = (inspect.unwrap(value) for value in vars(kind).values() if inspect.isfunction(value))
    return {name for method in methods for name in method.__code__.co_names}
