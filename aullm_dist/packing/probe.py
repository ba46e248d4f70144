"""Probes a backbone's own architecture, tiny: runs it packed and padded before anything is loaded.

Whether packed branches equal padded rows is a property of the library's modelling code: whether its layers pass the
layout on to the attention, what they hide behind a mask alone, what they remember besides keys and values. A list of
names goes stale with every release, and a name says nothing of flags. So the property is measured with random weights:
hidden states and the gradients of all inputs and weights, in float32, against the library's eager attention. What
deviates is refused with the number, what raises is refused with the library's words; nothing is decided by name.

Letters: K suffixes of S tokens behind P prefix tokens, D LLM width.
"""

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from aullm_dist.library_errors import LIBRARY_ERRORS, in_one_line
from aullm_dist.packing import attention
from aullm_dist.packing.forward import decoder_of, packed_hidden, padded_hidden
from aullm_dist.packing.shrink import VOCAB, KeyedConfig, shrink

PREFIX_TOKENS, SUFFIX_TOKENS, SUFFIXES = 13, 7, 3
TOLERANCE = 1e-4
"""Largest relative deviation of hidden states and gradients; right ones stay below 1e-5, wrong ones are above 1e-2."""

SECONDS = 10
"""What a probe may compute for; known types take 1 to 3."""
_NOT_FINITE = "gives hidden states that are not finite, whatever its weights: a setting of its config.json is wrong"


@dataclass(frozen=True, slots=True)
class Finding:
    """What the probe saw of an architecture."""

    refusal: str | None
    """Why it is refused; None if it is not."""
    deviation: float = 0.0
    """The largest relative deviation of hidden states and gradients."""
    proven: bool = True
    """Whether a refusal says something of the architecture: one that cannot be built small may still run."""


_TOO_SLOW = Finding(f"takes more than {SECONDS} s at its smallest, too long to prove anything", proven=False)


def probe_padded(config: PretrainedConfig) -> Finding:
    """Return whether rows of embeddings are the rows of their ids, causally, with gradients.

    Args:
        config: of a text decoder that the library knows.
    """
    return _padded(*_small(config))


def probe_packed(config: PretrainedConfig) -> Finding:
    """Return whether packed branches equal padded rows through prefix attention.

    Args:
        config: of a text decoder that the library knows.
    """
    return _packed(*_small(config))


def _small(config: PretrainedConfig) -> tuple[KeyedConfig, str]:
    """Return the small config, or the whole one with what stands in the way."""
    try:
        small = shrink(config)
    except LIBRARY_ERRORS as error:
        return KeyedConfig(config), f"cannot be built small ({in_one_line(error)})"
    return KeyedConfig(small), ""


@functools.lru_cache(maxsize=256)
def _padded(small: KeyedConfig, problem: str) -> Finding:
    with quietly():
        try:
            if problem:
                return Finding(problem, proven=False)
            model = tiny_model(small.config)
            with torch.no_grad():
                by_ids = decoder_of(model)(input_ids=_ids(), use_cache=False).last_hidden_state
            if not by_ids.isfinite().all():
                return Finding(_NOT_FINITE)
        except LIBRARY_ERRORS as error:
            return Finding(f"cannot be built small ({in_one_line(error)})", proven=False)
        except TooSlow:
            return _TOO_SLOW
        try:
            return _compare_with_ids(model, by_ids)
        except TooSlow:
            return _TOO_SLOW
        except LIBRARY_ERRORS as error:
            return Finding(f"cannot take embeddings instead of ids ({in_one_line(error)})")


@functools.lru_cache(maxsize=256)
def _packed(small: KeyedConfig, problem: str) -> Finding:
    with quietly():
        try:
            if problem:
                return Finding(problem, proven=False)
            return _compare_with_padded(tiny_model(small.config))
        except TooSlow:
            return _TOO_SLOW
        except LIBRARY_ERRORS as error:
            words = in_one_line(error)
            # Prefix attention is given the layout, and the library makes no mask for it.
            without = ", which packed branches do not have" if words.endswith(" needs attention_mask") else ""
            return Finding(f"cannot run packed ({words}{without})")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Let the block run in float32 with gradients, without warnings, and leave torch's generator as it was.

    Raises:
        TooSlow: it computes for longer than `SECONDS`.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        with torch.autocast("cpu", enabled=False), _Deadline(SECONDS):
            yield


class TooSlow(BaseException):
    """The tiny model takes longer than the probe may; no error of modelling code, so nothing of that catches it."""


class _Deadline(TorchDispatchMode):
    """Raises `TooSlow` at the first operation after so many seconds of this thread's computing.

    Waiting for a processor does not count: on a busy machine an architecture is not slower than elsewhere.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._end = time.thread_time() + seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.thread_time() > self._end:
            raise TooSlow
        return func(*args, **(kwargs or {}))


def tiny_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model of a small config, with weights that let every part be felt."""
    torch.default_generator.manual_seed(0)
    with torch.device("cpu"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="eager"
        )
    for parameter in model.parameters():
        # Fresh norms, biases, sinks and gates are ones, zeros or nothing at all, which would hide one that got lost.
        if not parameter.isfinite().all():
            parameter.data.zero_()
        if parameter.ndim < 2:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        elif parameter.std() < 0.2 * parameter.shape[-1] ** -0.5 or parameter.abs().max() == 0:
            parameter.data.normal_(std=0.5 * parameter.shape[-1] ** -0.5)
    return model.eval()


def _ids() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB, (SUFFIXES, PREFIX_TOKENS + SUFFIX_TOKENS), generator=generator)


def _compare_with_ids(model: PreTrainedModel, by_ids: Tensor) -> Finding:
    ids = _ids()
    embed = model.get_input_embeddings()
    everywhere = range(SUFFIX_TOKENS)
    rows = [
        padded_hidden(model, embed(row[:PREFIX_TOKENS]), embed(row[PREFIX_TOKENS:])[None].detach(), everywhere, ids=row)
        for row in ids
    ]
    deviation = _deviation(torch.cat(rows), by_ids[:, PREFIX_TOKENS:])
    if not deviation <= TOLERANCE:
        return Finding(f"gives other hidden states for embeddings than for their ids (by {deviation:.2g})", deviation)
    prefix, suffixes = _embeddings(model)
    hidden = padded_hidden(model, prefix, suffixes, everywhere)
    with torch.no_grad():
        changed = suffixes.detach().clone()
        # Not by a constant: norms that take off the mean would hide that from every other token.
        changed[:, -1] = changed[:, -1].flip(-1)
        again = padded_hidden(model, prefix, changed, everywhere)
    leak = _deviation(again[:, :-1], hidden[:, :-1])
    if not leak <= TOLERANCE:
        return Finding(f"is not causal: a token changes what stands before it (by {leak:.2g})", leak)
    gradients = torch.autograd.grad(hidden.square().sum(), [prefix, suffixes])
    if not all(gradient.isfinite().all() and gradient.norm() > 0 for gradient in gradients):
        return Finding("has no gradient with respect to its input embeddings")
    return Finding(None, deviation)


def _compare_with_padded(model: PreTrainedModel) -> Finding:
    config = decoder_of(model).config
    expected = _hidden_and_gradients(model, padded_hidden)
    if not expected[0].isfinite().all():
        return Finding(_NOT_FINITE)
    config._attn_implementation = attention.NAME
    found = _hidden_and_gradients(model, packed_hidden)
    deviation = max(_deviation(one, other) for one, other in zip(found, expected, strict=True))
    if not deviation <= TOLERANCE:
        return Finding(
            f"gives other hidden states or gradients packed than padded (by {deviation:.2g}, allowed: {TOLERANCE:.0e})",
            deviation,
        )
    rows = _hidden_and_gradients(model, padded_hidden)
    deviation = max(deviation, *(_deviation(one, other) for one, other in zip(rows, expected, strict=True)))
    if not deviation <= TOLERANCE:
        return Finding(f"gives other hidden states with prefix attention than eagerly (by {deviation:.2g})", deviation)
    return Finding(None, deviation)


def _hidden_and_gradients(model: PreTrainedModel, run: Callable[..., Tensor]) -> list[Tensor]:
    """Return hidden states [K, S, D], the gradients of all inputs, and all gradients of weights as one vector."""
    model.zero_grad(set_to_none=True)
    prefix, suffixes = _embeddings(model)
    hidden = run(model, prefix, suffixes, range(SUFFIX_TOKENS))
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (hidden * weights + 0.1 * hidden.square()).sum().backward()
    trained = [p.grad.reshape(-1) for p in decoder_of(model).parameters() if p.grad is not None]
    assert prefix.grad is not None
    assert suffixes.grad is not None
    return [hidden.detach(), prefix.grad, suffixes.grad, torch.cat(trained)]


def _embeddings(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Return a prefix [P, D] of words and suffixes [K, S, D] of soft tokens, both with gradients."""
    ids = _ids()
    with torch.no_grad():
        prefix = model.get_input_embeddings()(ids[0, :PREFIX_TOKENS]).clone()
        words = model.get_input_embeddings()(ids[:, PREFIX_TOKENS:])
        noise = torch.randn(words.shape, generator=torch.Generator().manual_seed(3))
        suffixes = words + 0.5 * words.std() * noise
    return prefix.requires_grad_(), suffixes.requires_grad_()


def _deviation(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to what is expected; not a number where either is not finite."""
    return ((found - expected).norm() / expected.norm()).item()
