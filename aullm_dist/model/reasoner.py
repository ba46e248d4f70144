"""Implements the language half of AULLM++: soft tokens in, one logit per AU out.

It builds the suffix of every branch around its content and instruction token, runs the LLM over all branches, packed or
padded, and reads the answer out with a linear head in float32. What the tokens are made of is not its business.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from aullm_dist.llm.backbone import Backbone, embedding_rms, mean_embeddings
from aullm_dist.model.prompt import Prompt
from aullm_dist.packing.forward import SOFT, packed_hidden, padded_hidden
from aullm_dist.packing.layout import rows_of
from aullm_dist.packing.self_check import self_check
from aullm_dist.packing.support import check_packable


class Reasoner(nn.Module):
    """LLM with LoRA, structured prompt and readout.

    Letters: Nc content tokens, Ni instruction tokens, K branches, P prefix tokens, S suffix tokens, A AUs, D LLM width.

    Readout `last`: the last position's final hidden state -> `au_head`, D -> A. Readout `per_au`: one learned marker
    token per AU (`au_markers`, first the LLM's own embedding of the AU's FACS name) after the question, a head D -> 1
    that all AUs share and one bias per AU (`au_bias`). The head draws its first weights from torch's global generator.

    A reasoner that `amends` adds to what the stages before it say, at first nothing: its head starts at zero.

    Args:
        backbone: from `load_backbone`.
        prompt: from `build_prompt` with the backbone's tokenizer; it decides AUs, readout and structure token.
        packing: one shared-prefix sequence (true), or one row per branch (false, the reference).
        suffixes_per_row: suffixes in one packed row; 0 puts all of them into one.
        suffix_multiple: packed rows are filled up, with padding suffixes, to a multiple of this.
        scale: `embedding_rms` of the LLM where it is known already; a pass over the whole vocabulary otherwise.
        names: `mean_embeddings` of the AUs' FACS names where they are known already, [A, D].
        amends: whether the answer is added to that of earlier stages.

    Raises:
        UserError: `packing` with a backbone or an attention that is not proven for it.
    """

    static_ids: Tensor
    row_ids: Tensor

    def __init__(
        self,
        backbone: Backbone,
        prompt: Prompt,
        *,
        packing: bool = True,
        suffixes_per_row: int = 0,
        suffix_multiple: int = 1,
        scale: float | None = None,
        names: Tensor | None = None,
        amends: bool = False,
    ) -> None:
        super().__init__()
        if packing:
            network: Any = backbone.model
            check_packable(backbone.config, network.config._attn_implementation)
        self.llm = backbone.model
        self.scale = embedding_rms(self.llm) if scale is None else scale
        self.prompt = prompt
        self.packing = packing
        self.suffixes_per_row, self.suffix_multiple = suffixes_per_row, suffix_multiple
        self.num_aus = len(prompt.aus)
        width = backbone.hidden_size
        if prompt.readout == "per_au":
            first = mean_embeddings(self.llm, prompt.name_ids) if names is None else names.clone()
            self.au_markers = nn.Parameter(first)
            self.au_head = nn.Linear(width, 1, bias=False)
            self.au_bias = nn.Parameter(torch.zeros(self.num_aus))
        else:
            self.au_head = nn.Linear(width, self.num_aus)
        if amends:
            for parameter in self.au_head.parameters():
                nn.init.zeros_(parameter)
        static = prompt.prefix_ids + prompt.structure_ids + prompt.question_ids
        self.register_buffer("static_ids", torch.tensor(static), persistent=False)
        self.register_buffer("row_ids", torch.tensor(_row_ids(prompt)), persistent=False)

    def forward(
        self, content: Tensor, instruction: Tensor | None, branches: Tensor, *, return_hidden: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Answer every branch.

        Args:
            content: [Nc, D], content tokens at the scale of the LLM's embeddings.
            instruction: [Ni, D], instruction tokens; None exactly when the prompt has no structure token.
            branches: int64 [K, 2], per branch the rows of `content` and `instruction` it uses. Branches may share
                tokens: gradients add up.
            return_hidden: also return the hidden states that were read out.

        Returns:
            float32 logits [K, A]; with `return_hidden` also float32 hidden states [K, D], for `per_au` their mean.
        """
        prefix, suffix = self._embeds(content, instruction, branches)
        hidden = self.hidden(prefix, suffix).float()
        # The head stays out of autocast: logits of a few units lose too much in bfloat16.
        with torch.autocast(hidden.device.type, enabled=False):
            if self.prompt.readout == "per_au":
                logits = self.au_head(hidden).squeeze(-1) + self.au_bias
            else:
                logits = self.au_head(hidden.squeeze(1))
        return (logits, hidden.mean(dim=1)) if return_hidden else logits

    def hidden(self, prefix: Tensor, suffix: Tensor) -> Tensor:
        """Run the LLM over all branches.

        Args:
            prefix: [P, D], embeddings of the static prefix.
            suffix: [K, S, D], those of the suffixes.

        Returns:
            [K, R, D], hidden states at the read-out positions, after the final norm.
        """
        if not self.packing:
            return padded_hidden(self.llm, prefix, suffix, self.prompt.readout_positions, ids=self.row_ids)
        layout = self._layout(len(suffix))
        return packed_hidden(self.llm, prefix, suffix, self.prompt.readout_positions, ids=self.row_ids, **layout)

    def num_tokens(self, num_branches: int) -> int:
        """Return how many tokens the LLM computes for `num_branches` branches, those that fill rows up included."""
        lengths = (self.prompt.prefix_tokens, self.prompt.suffix_tokens)
        return tokens_computed(num_branches, *lengths, self.packing, self.suffixes_per_row, self.suffix_multiple)

    def self_check(self, *, tolerance: float | None = None) -> float:
        """Compare a few packed branches of random soft tokens with their padded twins (`packing.self_check`)."""
        device = self.static_ids.device
        generator = torch.Generator().manual_seed(0)
        width = self.au_head.in_features
        soft = (torch.randn(2, 3, width, generator=generator) * self.scale).to(device)
        branches = torch.arange(3, device=device)[:, None].expand(-1, 2)
        with torch.no_grad():
            prefix, suffix = self._embeds(soft[0], soft[1] if self.prompt.use_structure else None, branches)
        layout = self._layout(len(suffix))
        return self_check(
            self.llm, prefix, suffix, self.prompt.readout_positions, **layout, ids=self.row_ids, tolerance=tolerance
        )

    def _layout(self, num_suffixes: int) -> dict[str, int]:
        return _layout(num_suffixes, self.suffixes_per_row, self.suffix_multiple)

    def _embeds(self, content: Tensor, instruction: Tensor | None, branches: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prefix [P, D] and the suffixes [K, S, D] in the dtype of the LLM's embeddings."""
        assert (instruction is not None) == self.prompt.use_structure, "instruction tokens do not fit the prompt"
        llm: Any = self.llm
        static: Tensor = llm.get_input_embeddings()(self.static_ids)
        lengths = [len(self.prompt.prefix_ids), len(self.prompt.structure_ids), len(self.prompt.question_ids)]
        prefix, structure, question = static.split(lengths)
        num_branches = len(branches)
        # A plain index, not index_select: its backward adds up in a fixed order on every device.
        parts = [content[branches[:, 0]].to(static.dtype)[:, None]]
        if instruction is not None:
            parts += [structure.expand(num_branches, -1, -1), instruction[branches[:, 1]].to(static.dtype)[:, None]]
        parts.append(question.expand(num_branches, -1, -1))
        if self.prompt.readout == "per_au":
            parts.append(self.au_markers.to(static.dtype).expand(num_branches, -1, -1))
        return prefix, torch.cat(parts, dim=1)


def _row_ids(prompt: Prompt) -> list[int]:
    """Return the token ids of the prefix and of every suffix, `SOFT` where a soft token or a marker stands."""
    ids = [*prompt.prefix_ids, SOFT]
    if prompt.use_structure:
        ids += [*prompt.structure_ids, SOFT]
    ids += prompt.question_ids
    return ids + [SOFT] * (len(prompt.aus) if prompt.readout == "per_au" else 0)


def tokens_computed(
    branches: int, prefix: int, suffix: int, packing: bool, suffixes_per_row: int, suffix_multiple: int
) -> int:
    """Return how many tokens the LLM computes for a number of branches, those that fill rows up included.

    Args:
        branches: K.
        prefix: P.
        suffix: S.
        packing: whether suffixes share a row.
        suffixes_per_row: as many at most; 0 puts all into one row.
        suffix_multiple: packed rows are filled up to a multiple of this.
    """
    if not packing:
        return branches * (prefix + suffix)
    rows, per_row = rows_of(branches, **_layout(branches, suffixes_per_row, suffix_multiple))
    return rows * (prefix + per_row * suffix)


def _layout(suffixes: int, suffixes_per_row: int, multiple: int) -> dict[str, int]:
    rows = math.ceil(suffixes / suffixes_per_row) if suffixes_per_row > 0 else 1
    return {"rows": rows, "multiple": multiple}
