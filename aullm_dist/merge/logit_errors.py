"""Measures how far merged weights answer from the model that was trained: relative errors of logits on a few prompts.

Every weight is read, merged by the merge's own arithmetic, used and forgotten, block of rows by block of rows: a probe
needs no more memory than a merge, and reads the LLM once per way of computing it. The reference is the model that was
trained, LoRA on its frozen weights, in float32 arithmetic. Its own error in the arithmetic of the run says how much
of an error is rounding.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from aullm_dist.errors import UserError
from aullm_dist.llm.pieces.buffers import fill_buffers
from aullm_dist.llm.pieces.skeleton import dtypes_of, model_without_storage
from aullm_dist.llm.pieces.values import values_in_files
from aullm_dist.llm.pieces.walk import holders_of, kept_buffers, owners
from aullm_dist.llm.stored.conversion import Values
from aullm_dist.llm.stored.weight_files import StoredTensor, WeightFiles
from aullm_dist.merge.adapter import Adapter, Delta, Factors
from aullm_dist.merge.compute import Arithmetic, Slot, State
from aullm_dist.merge.plan import Merged, Piece, Plan

POSITIONS = 16
"""Last positions of each prompt whose logits are compared."""
_LONGEST = 512
_ROWS = 64
_WEIGHTS_AT_ONCE = 2**21


@dataclass(frozen=True, slots=True)
class _LLM:
    """An LLM that is computed from its files, with the adapter of the checkpoint."""

    config: PretrainedConfig
    files: WeightFiles
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Prompts as the LLM is given them."""

    ids: Tensor
    """`[B, T]`, padded on the left."""
    mask: Tensor
    """`[B, T]`: which are real."""
    keep: int
    """How many positions at the end are compared."""


def probe_errors(
    plans: Mapping[str, Plan],
    trained: str,
    prompts: Sequence[str],
    tokenizer: Any,
    *,
    config: PretrainedConfig,
    files: WeightFiles,
    adapter: Adapter,
    compute: torch.dtype,
) -> dict[str, Any]:
    """Measure the errors of merged weights.

    Args:
        plans: what could be written, by the base that it starts from.
        trained: the key in `plans` of the base that the adapter was trained on.
        prompts: texts.
        tokenizer: of the LLM.
        config: of the LLM.
        files: of the base.
        adapter: of the checkpoint.
        compute: dtype that the run computed in.

    Returns:
        `prompts` and `positions` that were compared; `relative_logit_error` and `changed_argmax` (a share) by way:
        `live`, the model that was trained in the arithmetic of the run, and each key of `plans`.

    Raises:
        UserError: a prompt without tokens, or weights that are not finite.
    """
    ids, mask = _tokens(prompts, tokenizer)
    keep = min(POSITIONS, int(mask.sum(dim=1).min()))
    apart = _without_deltas(plans[trained], compute)
    answer = functools.partial(_logits, _LLM(config, files, adapter), _Tokens(ids, mask, keep))
    beside = {delta.module: delta for tensor in plans[trained].tensors if (delta := tensor.delta) is not None}
    arithmetic = Arithmetic(files, adapter, compute)
    expected = answer(apart, beside, arithmetic=arithmetic, dtype=torch.float32)
    answers = {"live": answer(apart, beside, arithmetic=arithmetic, dtype=compute)}
    for name, plan in plans.items():
        dtype = next(tensor.dtype for tensor in plan.tensors if tensor.delta is not None)
        answers[name] = answer(plan, {}, arithmetic=arithmetic, dtype=dtype)
    return {
        "prompts": len(prompts),
        "positions": keep * len(prompts),
        "relative_logit_error": {
            name: ((found - expected).norm() / expected.norm()).item() for name, found in answers.items()
        },
        "changed_argmax": {
            name: (found.argmax(-1) != expected.argmax(-1)).float().mean().item() for name, found in answers.items()
        },
    }


def _tokens(prompts: Sequence[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return token ids `[B, T]`, padded on the left, and which of them are real."""
    rows = [list(tokenizer(prompt).input_ids)[:_LONGEST] for prompt in prompts]
    empty = [prompt for prompt, row in zip(prompts, rows, strict=True) if not row]
    if empty:
        raise UserError(f"--probe: the tokenizer has no token for the prompt {empty[0]!r}")
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def _without_deltas(plan: Plan, dtype: torch.dtype) -> Plan:
    """Return the plan of the frozen weights alone, in the dtype that training saw them in."""
    return Plan(
        tuple(
            replace(
                file,
                tensors=tuple(
                    replace(tensor, delta=None, dtype=dtype if tensor.dtype.is_floating_point else tensor.dtype)
                    for tensor in file.tensors
                ),
            )
            for file in plan.files
        )
    )


@torch.inference_mode()
def _logits(
    llm: _LLM, tokens: _Tokens, plan: Plan, beside: Mapping[str, Delta], arithmetic: Arithmetic, dtype: torch.dtype
) -> Tensor:
    """Return float32 logits `[B, keep, vocabulary]` of the LLM with a plan's weights, and deltas apart from them."""
    files, adapter, mask = llm.files, llm.adapter, tokens.mask
    model = model_without_storage(llm.config, dtype, None, keep_head=True).eval()
    fill_buffers(model, torch.device("cpu"))
    weights = _Weights(plan, arithmetic)
    dtypes, found = dtypes_of(model, dtype), _values(model, plan, files)
    # All at once: a tied head loses its weight with the embedding's.
    streamed = [(name, module, found[f"{name}.weight"]) for name, module in model.named_modules() if _streams(module)
                and f"{name}.weight" in found and found[f"{name}.weight"].make is None]  # fmt: skip
    for name, module, values in streamed:
        if isinstance(module, nn.Linear):
            factors = adapter.read(beside[name]) if name in beside else None
            # On this one object, as PyTorch looks `forward` up there first.
            setattr(module, "forward", functools.partial(_product, module, weights, values, factors))  # noqa: B010
        elif isinstance(module, nn.Embedding):
            module.padding_idx = None
            module.register_forward_pre_hook(functools.partial(_look_up, weights, values))
    done = {f"{name}.weight" for name, _, _ in streamed}
    holders = holders_of(model)
    for full, name, module in list(owners(model)):
        if full not in done:
            made = weights.whole(found[full]).to(dtypes[full])
            weight = nn.Parameter(made, requires_grad=False)
            for holder, own in holders[module._parameters[name]]:
                holder.register_parameter(own, weight)
    for full, name, module in list(kept_buffers(model)):
        module._buffers[name] = weights.whole(found[full]).to(dtypes[full])
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    out = model(
        input_ids=tokens.ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=tokens.keep
    )
    return out.logits.float()


def _streams(module: nn.Module) -> bool:
    """Whether a module's weight is read when it is used, and forgotten."""
    return isinstance(module, nn.Linear | nn.Embedding)


def _values(model: PreTrainedModel, plan: Plan, files: WeightFiles) -> dict[str, Values]:
    """Return where all parameters and kept buffers stand, tied ones under each of their names."""
    # Shapes are all that is asked of them.
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors if tensor.how == "unpack"}
    dense = {
        tensor.name: replace(tensor.source, shape=shapes.get(tensor.name, tensor.source.shape))
        for tensor in plan.tensors
    }
    found = values_in_files(model, dense, str(files.folder))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    by_identity = {id(tensors[full]): values for full, values in found.items()}
    return {full: by_identity[id(tensor)] for full, tensor in tensors.items() if id(tensor) in by_identity}


class _Weights:
    """The weights of a plan, computed when they are asked for."""

    def __init__(self, plan: Plan, arithmetic: Arithmetic) -> None:
        self._tensors: dict[str, list[Merged]] = {}
        for tensor in plan.tensors:
            self._tensors.setdefault(tensor.name, []).append(tensor)
        self._arithmetic = arithmetic
        self._slot = Slot(torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8))

    def whole(self, values: Values) -> Tensor:
        """Return a parameter that LoRA leaves alone, as a tensor of its own."""
        if values.make is not None:
            return values.make(self).view(values.shape)
        parts = [self._copied(run.stored, run.first, run.last) for run in values.runs]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(values.shape)

    def read(self, name: str) -> Tensor:
        """Return a tensor of the new files, flat; what `WeightFiles.read` is to a `Values.make`."""
        return self._copied(name, 0, sum(tensor.numel for tensor in self._tensors[name]))

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name][0].source

    def rows(self, values: Values) -> Iterator[Tensor]:
        """Yield the rows of a weight, some at a time; each lasts until the next is asked for."""
        columns = values.shape[1]
        step = max(1, _WEIGHTS_AT_ONCE // (columns * _ROWS)) * _ROWS * columns
        for run in values.runs:
            for tensor, begin, end in self._parts(run.stored, run.first, run.last):
                state: Future[State] = Future()
                state.set_result(self._arithmetic.prepare(tensor))
                for first in range(begin, end, step):
                    yield self._values(tensor, state, first, min(first + step, end)).view(-1, columns)

    def row(self, values: Values, number: int) -> Tensor:
        """Return one row of a weight that LoRA and NF4 leave alone."""
        columns = values.shape[1]
        (run,) = values.part(number * columns, (number + 1) * columns)
        return self._copied(run.stored, run.first, run.last)

    def _copied(self, name: str, first: int, last: int) -> Tensor:
        """Return elements `first` up to, not including, `last` of a tensor of the new files."""
        found = []
        for tensor, begin, end in self._parts(name, first, last):
            state: Future[State] = Future()
            state.set_result(self._arithmetic.prepare(tensor))
            found.append(self._values(tensor, state, begin, end).clone())
        return found[0] if len(found) == 1 else torch.cat(found)

    def _parts(self, name: str, first: int, last: int) -> Iterator[tuple[Merged, int, int]]:
        """Yield the stretches that elements of a tensor are in, with the first and the last (not included) in each."""
        for tensor in self._tensors[name]:
            begin, end = max(first - tensor.skip, 0), min(last - tensor.skip, tensor.numel)
            if begin < end:
                yield tensor, begin, end

    def _values(self, tensor: Merged, state: "Future[State] | None", first: int, last: int) -> Tensor:
        size = (last - first) * max(tensor.source.dtype.itemsize, tensor.dtype.itemsize)
        if len(self._slot.read) < size:
            self._slot = Slot(torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8))
        view = self._arithmetic.compute(Piece(tensor, first, last), state, self._slot)
        return torch.frombuffer(view, dtype=tensor.dtype)


def _product(layer: nn.Linear, weights: _Weights, values: Values, factors: Factors | None, x: Tensor) -> Tensor:
    """Compute a linear layer, and PEFT's LoRA in addition."""
    found = torch.cat([functional.linear(x, rows.to(x.dtype)) for rows in weights.rows(values)], dim=-1)
    if layer.bias is not None:
        found = found + layer.bias
    if factors is None:
        return found
    added = functional.linear(functional.linear(x.float(), factors.down), factors.up)
    return found + (added if factors.scaling is None else added * factors.scaling).to(found.dtype)


def _look_up(weights: _Weights, values: Values, embedding: nn.Embedding, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Give an embedding the rows that are looked up, and the numbers of these among them."""
    used, numbers = inputs[0].unique(return_inverse=True)
    rows = torch.stack([weights.row(values, number) for number in used.tolist()])
    dtype = embedding.weight.dtype
    embedding.weight = nn.Parameter(rows.to(dtype), requires_grad=False)
    return (numbers,)
