"""ASL against its published formula, and the terms of CCR against what they must do."""

import pytest
import torch

from aullm_dist.model.losses import AsymmetricLoss, consistency, contradiction


def _logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def test_asymmetric_loss_is_the_published_formula():
    logits = _logits(5, 4).float()
    labels = (_logits(5, 4, seed=1) > 0).float()
    p = torch.sigmoid(logits)
    shifted = (p - 0.05).clamp(min=0)
    positive = labels * (1 - p) ** 1 * p.log()
    negative = (1 - labels) * shifted**4 * (1 - shifted).log()
    expected = -(positive + negative).mean(dim=1)
    found = AsymmetricLoss(gamma_negative=4, gamma_positive=1, margin=0.05)(logits, labels)
    torch.testing.assert_close(found, expected)


def test_without_focusing_it_is_binary_cross_entropy():
    logits, labels = _logits(6, 3).float(), (_logits(6, 3, seed=2) > 0).float()
    found = AsymmetricLoss(0, 0, 0)(logits, labels)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(dim=1)
    torch.testing.assert_close(found, expected)


def test_hard_negatives_weigh_more_than_easy_ones():
    loss = AsymmetricLoss(gamma_negative=4, margin=0.05)
    easy, hard = loss(torch.tensor([[-3.0], [3.0]]), torch.zeros(2, 1))
    assert hard > 100 * easy
    assert loss(torch.tensor([[-6.0]]), torch.zeros(1, 1)).item() == 0.0


@pytest.mark.parametrize("value", [-80.0, 80.0])
def test_losses_stay_finite_at_extreme_logits(value):
    logits = torch.full((2, 3), value, requires_grad=True)
    labels = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    total = AsymmetricLoss()(logits, labels).sum() + consistency(logits, -logits).sum()
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(logits.grad).all()


def test_consistency_is_zero_for_equal_answers_and_moves_only_the_counterfactual():
    factual = _logits(4, 3).requires_grad_()
    other = _logits(4, 3, seed=3).requires_grad_()
    assert consistency(factual, factual).abs().max() < 1e-6
    assert (consistency(other, factual) > 0).all()
    consistency(other, factual).sum().backward()
    assert factual.grad is None
    assert other.grad.abs().sum() > 0


def test_contradiction_asks_for_an_effect_on_matching_evidence():
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    zero = torch.zeros(2, 2)
    strong = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
    # An instruction token that is ignored has no effect anywhere: the hinge stays at its margin.
    assert contradiction(zero, zero, zero, zero, labels, margin=0.25).tolist() == [0.25, 0.0]
    assert contradiction(strong, zero, zero, zero, labels, margin=0.25).tolist() == [0.0, 0.0]
    # A structure that overrules evidence without movement is as bad as one that is ignored.
    assert contradiction(strong, zero, strong, zero, labels, margin=0.25).tolist() == [0.25, 0.0]
