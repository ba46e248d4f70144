"""Computes the losses of AULLM++: asymmetric multi-label loss and the terms of CCR (the formulas of CCR are ours)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class AsymmetricLoss:
    """Asymmetric loss for multi-label classification.

    Positives weigh `(1 - p)^gamma_positive`, negatives `p_m^gamma_negative` with the shifted probability
    `p_m = max(p - margin, 0)`, so that easy negatives count little and very easy ones not at all.

    Source: Ben-Baruch et al., "Asymmetric Loss For Multi-Label Classification" (2020), equation 7. AU-LLM's public code
    weighs hard negatives down instead; that is not copied.
    """

    gamma_negative: float = 2.0
    gamma_positive: float = 0.0
    margin: float = 0.05

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss per clip `[N]`, the mean over AUs of `logits` and `labels` `[N, A]`."""
        logits, labels = logits.float(), labels.float()
        positive = torch.sigmoid(logits)
        shifted = (positive - self.margin).clamp(min=0.0)
        log_positive = functional.logsigmoid(logits)
        # log(1 - p_m) is finite everywhere: with a margin p_m stays below 1, without one it is logsigmoid(-z).
        log_negative = torch.log1p(-shifted) if self.margin > 0 else functional.logsigmoid(-logits)
        weight_positive = (1.0 - positive) ** self.gamma_positive if self.gamma_positive else 1.0
        weight_negative = shifted**self.gamma_negative if self.gamma_negative else 1.0
        return -(labels * weight_positive * log_positive + (1 - labels) * weight_negative * log_negative).mean(dim=-1)


def consistency(logits: Tensor, factual_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence per clip `[N]` between per-AU Bernoullis; the factual answer `[N, A]` is held fixed."""
    p = torch.sigmoid(factual_logits.detach().float())
    q = torch.sigmoid(logits.float())
    middle = 0.5 * (p + q)
    return (_entropy(middle) - 0.5 * (_entropy(p) + _entropy(q))).mean(dim=-1)


def _entropy(p: Tensor) -> Tensor:
    """Entropy of Bernoullis in nats."""
    p = p.clamp(1e-6, 1 - 1e-6)
    return -(p * p.log() + (1 - p) * (1 - p).log())


def contradiction(
    matching: Tensor, evidence_only: Tensor, structure_only: Tensor, neither: Tensor, labels: Tensor, margin: float
) -> Tensor:
    """Hinge per clip `[N]`: a structure must move the answer more on matching evidence than on evidence without
    movement.

    With evidence and structure of the clip and of its neutral twin crossed, the structure's effect on the probabilities
    of the clip's active AUs is `matching - evidence_only` on matching evidence and `structure_only - neither` on
    evidence that supports no AU. The first must exceed the second by `margin`. This is what keeps the consistency
    under structure edits from teaching the LLM to ignore the instruction token. Clips without an active AU give 0.

    Args:
        matching: `[N, A]` logits of (clip's content token, clip's instruction token).
        evidence_only: `[N, A]` logits of (clip's content token, neutral twin's instruction token).
        structure_only: `[N, A]` logits of (neutral twin's content token, clip's instruction token).
        neither: `[N, A]` logits of (neutral twin's content token, neutral twin's instruction token).
        labels: `[N, A]`, 1 for active AUs.
        margin: probability.
    """
    answers = [torch.sigmoid(logits.float()) for logits in (matching, evidence_only, structure_only, neither)]
    effect = (answers[0] - answers[1]) - (answers[2] - answers[3])
    hinge = functional.relu(margin - effect) * labels
    return hinge.sum(dim=-1) / labels.sum(dim=-1).clamp(min=1.0)
