"""Runs one packed forward for many branches that share a static prefix, and the padded forward that it must equal.

K suffixes of S tokens behind one prefix of P tokens become one sequence of P + K*S tokens instead of K rows of P + S. A
suffix sees the prefix and, causally, itself; its position ids restart at P. Both paths are the same function, gradients
included; the padded one is the oracle of the tests and what `packing: off` runs. LoRA dropout differs between them.

Letters: K suffixes (branches times clips), P prefix tokens, S suffix tokens, R readout positions, D LLM width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from aullm_dist.errors import UserError
from aullm_dist.packing import attention
from aullm_dist.packing.hybrids import carry_states
from aullm_dist.packing.layout import positions_and_segments, read_out, rows_of
from aullm_dist.packing.masks import kept_masks

SOFT = -1
"""Stands for the id of a token that has none: a soft token, or a learned marker."""


def decoder_of(llm: nn.Module) -> PreTrainedModel:
    """Return the decoder inside a causal LM, wrapped by PEFT or not: it ends in the final norm, before `lm_head`."""
    wrapped: Any = llm
    causal_lm = wrapped.get_base_model() if hasattr(llm, "get_base_model") else wrapped
    decoder = causal_lm.base_model
    # Llama 4's text decoder has its base model under another name than its class says.
    return causal_lm.model if decoder is causal_lm and hasattr(causal_lm, "model") else decoder


def packed_hidden(
    llm: nn.Module,
    prefix_embeds: Tensor,
    suffix_embeds: Tensor,
    readout_positions: Sequence[int],
    *,
    rows: int = 1,
    multiple: int = 1,
    ids: Tensor | None = None,
) -> Tensor:
    """Run all suffixes behind one copy of the prefix per row.

    Args:
        llm: causal LM, wrapped by PEFT or not.
        prefix_embeds: [P, D], input embeddings of the static prefix.
        suffix_embeds: [K, S, D], the suffixes.
        readout_positions: R positions within a suffix.
        rows: packed rows to cut the suffixes into. More rows repeat the prefix more often and attend over shorter
            sequences.
        multiple: rows are filled up until the number of their suffixes is a multiple of this.
        ids: int64 [P + S], token ids of the prefix and of every suffix, `SOFT` where there is none. Only decoders with
            embeddings per layer (Gemma 3n, Gemma 4 E2B) look at them; None takes all tokens for soft ones.

    Returns:
        [K, R, D], hidden states after the final norm.
    """
    num_suffixes, suffix_tokens, width = suffix_embeds.shape
    prefix_tokens = len(prefix_embeds)
    rows, per_row = rows_of(num_suffixes, rows, multiple)
    # What the fillers give is dropped, so they have no gradient either.
    fillers = suffix_embeds[:1].detach().expand(rows * per_row - num_suffixes, -1, -1)
    filled = torch.cat([suffix_embeds, fillers])
    prefix = prefix_embeds.expand(rows, prefix_tokens, width)
    sequence = torch.cat([prefix, filled.reshape(rows, per_row * suffix_tokens, width)], dim=1)
    shape = (prefix_tokens, suffix_tokens, per_row)
    positions, _ = positions_and_segments(*shape, sequence.device)

    decoder = decoder_of(llm)
    if decoder.config._attn_implementation == attention.NAME:
        carry_states(decoder)
        layout: dict[str, Any] = {"prefix_tokens": prefix_tokens, "suffix_tokens": suffix_tokens}
    else:
        layout = {"attention_mask": kept_masks(decoder.config, sequence, shape)}
    _check_length(decoder.config, prefix_tokens + suffix_tokens)
    layout |= _per_layer_inputs(decoder, sequence, ids, shape)
    output = decoder(inputs_embeds=sequence, position_ids=positions.expand(rows, -1), use_cache=False, **layout)
    hidden = output.last_hidden_state[:, prefix_tokens:].reshape(rows * per_row, suffix_tokens, -1)
    return read_out(hidden[:num_suffixes], readout_positions)


def padded_hidden(
    llm: nn.Module,
    prefix_embeds: Tensor,
    suffix_embeds: Tensor,
    readout_positions: Sequence[int],
    *,
    ids: Tensor | None = None,
) -> Tensor:
    """Run every suffix as a row of its own behind its own copy of the prefix: the reference of `packed_hidden`.

    All rows have P + S tokens, so there is nothing to pad and no mask but the causal one.

    Args:
        llm: causal LM, wrapped by PEFT or not.
        prefix_embeds: [P, D].
        suffix_embeds: [K, S, D].
        readout_positions: R positions within a suffix.
        ids: as in `packed_hidden`.

    Returns:
        [K, R, D], hidden states after the final norm.
    """
    rows = padded_rows(prefix_embeds, suffix_embeds)
    return rows_hidden(llm, rows, len(prefix_embeds), readout_positions, ids)


def padded_rows(prefix_embeds: Tensor, suffix_embeds: Tensor) -> Tensor:
    """Return [K, P + S, D], every suffix behind its own copy of the prefix."""
    prefix = prefix_embeds.expand(len(suffix_embeds), *prefix_embeds.shape)
    return torch.cat([prefix, suffix_embeds], dim=1)


def rows_hidden(
    llm: nn.Module, rows: Tensor, prefix_tokens: int, readout_positions: Sequence[int], ids: Tensor | None = None
) -> Tensor:
    """Return the hidden states [K, R, D] of padded rows [K, P + S, D] at R positions within the suffix."""
    decoder = decoder_of(llm)
    if decoder.config._attn_implementation == attention.NAME:
        _check_length(decoder.config, rows.shape[1])
    shape = (prefix_tokens, rows.shape[1] - prefix_tokens, 1)
    output = decoder(inputs_embeds=rows, use_cache=False, **_per_layer_inputs(decoder, rows, ids, shape))
    return read_out(output.last_hidden_state[:, prefix_tokens:], readout_positions)


def _check_length(config: PretrainedConfig, tokens: int) -> None:
    """Refuse texts longer than the chunks of a decoder whose tokens see no other chunk: no mask says so here.

    Raises:
        UserError: prefix and suffix together are longer than a chunk.
    """
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and tokens > chunk:
        raise UserError(
            f"packing: prefix and suffix have {tokens} tokens, {config.model_type} attends within chunks of {chunk}; "
            "allowed: a shorter prompt, or model.packing=false and model.attention=auto"
        )


def _per_layer_inputs(
    decoder: PreTrainedModel, sequence: Tensor, ids: Tensor | None, shape: tuple[int, int, int]
) -> dict[str, Tensor]:
    """Return what a decoder with embeddings per layer takes for them, nothing for others.

    A token without id has the padding id there, as images have in the library's own multimodal models.

    Args:
        decoder: the decoder.
        sequence: [B, P + K*S, D], its input embeddings.
        ids: [P + S].
        shape: (P, S, K).
    """
    if not getattr(decoder.config, "hidden_size_per_layer_input", None):
        return {}
    prefix_tokens, suffix_tokens, count = shape
    padding = getattr(decoder.config, "pad_token_id", None) or 0
    if ids is None:
        ids = torch.full((prefix_tokens + suffix_tokens,), SOFT, device=sequence.device)
    config: Any = decoder.config
    known = (ids >= 0) & (ids < config.vocab_size_per_layer_input)
    ids = ids.where(known, padding)
    row = torch.cat([ids[:prefix_tokens], ids[prefix_tokens:].repeat(count)])
    embed: Any = decoder.get_per_layer_inputs
    return {"per_layer_inputs": embed(row.expand(len(sequence), -1))}


def per_branch_hidden(
    llm: nn.Module,
    prefix_embeds: Tensor,
    suffix_embeds: Tensor,
    readout_positions: Sequence[int],
    *,
    clips: int,
) -> Tensor:
    """Run one padded forward per branch of `clips` rows each: what a trainer without packing would do.

    Args:
        llm: causal LM, wrapped by PEFT or not.
        prefix_embeds: [P, D].
        suffix_embeds: [branches * clips, S, D], branch by branch.
        readout_positions: R positions within a suffix.
        clips: rows of one forward.

    Returns:
        [branches * clips, R, D], hidden states after the final norm.
    """
    forwards = [padded_hidden(llm, prefix_embeds, branch, readout_positions) for branch in suffix_embeds.split(clips)]
    return torch.cat(forwards)
