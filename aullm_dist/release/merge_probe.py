"""How far merged weights answer from the model that was trained: relative errors of logits on a few prompts.

Every weight is read, merged by the merge's own arithmetic, used and forgotten, block of rows by block of rows: a probe
needs no more memory than a merge, and reads the LLM once per way of computing it. The reference is the model that was
trained, LoRA beside its frozen weights, in float32 arithmetic. Its own error in the arithmetic of the run says how much
of an error is rounding.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from aullm_dist.errors import UserError
from aullm_dist.model.piecewise import fill_buffers, model_without_storage, names_in_files, owners
from aullm_dist.model.weight_files import WeightFiles
from aullm_dist.release.merge_adapter import Adapter, Delta, Factors
from aullm_dist.release.merge_compute import Arithmetic, Slot, State
from aullm_dist.release.merge_plan import Merged, Piece, Plan

POSITIONS = 16
"""Last positions of each prompt whose logits are compared."""
_LONGEST = 512
_ROWS = 64
_WEIGHTS_AT_ONCE = 2**21


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
        trained: the key in `plans` of the base that the adapter was trained beside.
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
    answer = functools.partial(_logits, ids=ids, mask=mask, keep=keep, config=config, files=files, adapter=adapter)
    beside = {tensor.name: tensor.delta for tensor in plans[trained].tensors if tensor.delta is not None}
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
    plan: Plan,
    beside: Mapping[str, Delta],
    *,
    ids: Tensor,
    mask: Tensor,
    keep: int,
    config: PretrainedConfig,
    files: WeightFiles,
    adapter: Adapter,
    arithmetic: Arithmetic,
    dtype: torch.dtype,
) -> Tensor:
    """Return float32 logits `[B, keep, vocabulary]` of the LLM with the weights of a plan, and deltas beside them."""
    model = model_without_storage(config, dtype, None, keep_head=True).eval()
    fill_buffers(model, torch.device("cpu"))
    weights = _Weights(plan, arithmetic)
    stored = _stored_names(model, plan, files)
    # All at once: a tied head loses its weight with the embedding's.
    layers = [(stored.get(f"{name}.weight"), module) for name, module in model.named_modules()]
    for key, module in layers:
        if isinstance(module, nn.Linear):
            factors = adapter.read(beside[key]) if key in beside else None
            module.forward = functools.partial(_product, module, weights, key, factors)
        elif isinstance(module, nn.Embedding):
            module.padding_idx = None
            module.register_forward_pre_hook(functools.partial(_look_up, weights, key))
    for full, name, module in list(owners(model)):
        if not (isinstance(module, nn.Linear | nn.Embedding) and name == "weight"):
            module.register_parameter(name, nn.Parameter(weights.whole(stored[full]).to(dtype), requires_grad=False))
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=keep)
    return out.logits.float()


def _stored_names(model: nn.Module, plan: Plan, files: WeightFiles) -> dict[str, str]:
    """Return the names in the files of all parameters, tied ones under each of their names."""
    dense = {tensor.name: tensor for tensor in plan.tensors}
    names = names_in_files(model, dense, str(files.folder))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_identity = {id(parameters[full]): stored for full, stored in names.items()}
    return {full: by_identity[id(parameter)] for full, parameter in parameters.items()}


class _Weights:
    """The weights of a plan, computed when they are asked for."""

    def __init__(self, plan: Plan, arithmetic: Arithmetic) -> None:
        self._tensors = {tensor.name: tensor for tensor in plan.tensors}
        self._arithmetic = arithmetic
        self._slot = Slot(torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8))

    def whole(self, name: str) -> Tensor:
        """Return a tensor of its own."""
        tensor = self._tensors[name]
        return self._values(tensor, None, 0, tensor.numel).clone().view(tensor.shape)

    def rows(self, name: str) -> Iterator[Tensor]:
        """Yield the rows of a weight, some at a time; each lasts until the next is asked for."""
        tensor = self._tensors[name]
        columns = tensor.shape[1]
        state: Future[State] = Future()
        state.set_result(self._arithmetic.prepare(tensor))
        step = max(1, _WEIGHTS_AT_ONCE // (columns * _ROWS)) * _ROWS * columns
        for first in range(0, tensor.numel, step):
            yield self._values(tensor, state, first, min(first + step, tensor.numel)).view(-1, columns)

    def row(self, name: str, number: int) -> Tensor:
        """Return one row of a tensor that LoRA and NF4 leave alone."""
        columns = self._tensors[name].shape[1]
        return self._values(self._tensors[name], None, number * columns, (number + 1) * columns).clone()

    def _values(self, tensor: Merged, state: "Future[State] | None", first: int, last: int) -> Tensor:
        size = (last - first) * max(tensor.source.dtype.itemsize, tensor.dtype.itemsize)
        if len(self._slot.read) < size:
            self._slot = Slot(torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8))
        view = self._arithmetic.compute(Piece(tensor, first, last), state, self._slot)
        return torch.frombuffer(view, dtype=tensor.dtype)


def _product(layer: nn.Linear, weights: _Weights, name: str, factors: Factors | None, x: Tensor) -> Tensor:
    """Compute a linear layer, and PEFT's LoRA beside it."""
    found = torch.cat([functional.linear(x, rows.to(x.dtype)) for rows in weights.rows(name)], dim=-1)
    if layer.bias is not None:
        found = found + layer.bias
    if factors is None:
        return found
    added = functional.linear(functional.linear(x.float(), factors.down), factors.up)
    return found + (added if factors.scaling is None else added * factors.scaling).to(found.dtype)


def _look_up(weights: _Weights, name: str, embedding: nn.Embedding, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Give an embedding the rows that are looked up, and the numbers of these among them."""
    used, numbers = inputs[0].unique(return_inverse=True)
    rows = torch.stack([weights.row(name, number) for number in used.tolist()])
    dtype = embedding.weight.dtype
    embedding.weight = nn.Parameter(rows.to(dtype), requires_grad=False)
    return (numbers,)
