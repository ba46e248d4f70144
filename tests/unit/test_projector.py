"""The evidence projector (MGE-EFP)."""

import pytest
import torch

from aullm_dist.errors import UserError
from aullm_dist.model.projector import EvidenceProjector, ScaledToken, region_index


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_projector(**changes):
    return EvidenceProjector(8, 16, 32, cell_grid=(2, 9, 9), heads=3, embedding_rms=0.02, **changes)


def inputs(views=2):
    return torch.randn(views, 162, 8, requires_grad=True), torch.randn(views, 16, requires_grad=True)


def test_regions_are_thirds_of_the_face_at_all_times():
    regions = region_index((2, 9, 9)).view(2, 9, 9)
    assert torch.equal(regions[0], regions[1])
    assert regions[0, ::3, ::3].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert regions.flatten().bincount().tolist() == [18] * 9
    assert region_index((1, 17, 17)).max() == 8


@pytest.mark.parametrize("evidence", ["full", "mid_only", "high_only", "no_attention"])
def test_the_token_has_the_scale_of_the_embeddings(evidence):
    projector = make_projector(evidence=evidence)
    cells, high = inputs()
    token = projector(cells, high).token
    assert token.shape == (2, 32)
    torch.testing.assert_close(token.square().mean(1).sqrt(), torch.full((2,), 0.02), rtol=1e-2, atol=0)
    (token * torch.randn(2, 32)).sum().backward()
    for name, parameter in projector.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert (cells.grad is None) == (evidence == "high_only")
    assert (high.grad is None) == (evidence == "mid_only")
    heads = 3 if evidence in ("full", "mid_only") else 0
    attention = projector(cells, high, return_attention=True).attention
    assert attention.shape == (2, heads, 162)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, heads))


def test_full_evidence_reads_where_a_cell_lies():
    projector = make_projector().eval()
    cells, high = inputs()
    grid = cells.detach().unflatten(1, (2, 9, 9))
    assert not torch.allclose(
        projector(grid.flip(2).flatten(1, 3), high).token, projector(cells, high).token, atol=1e-4
    )


def test_the_summary_decides_where_the_heads_look():
    projector = make_projector()
    cells, high = inputs()
    looks = projector(cells[:1].expand(2, -1, -1), high, return_attention=True).attention
    assert not torch.allclose(looks[0], looks[1], atol=1e-3)
    assert not torch.allclose(looks[0, 0], looks[0, 1], atol=1e-3)


def test_the_scale_is_saved_with_the_weights():
    state = make_projector().state_dict()
    assert state["scale.rms"].item() == pytest.approx(0.02)
    assert "regions" not in state
    assert ScaledToken(0.5)(torch.randn(2, 8).bfloat16()).dtype == torch.float32


def test_a_zero_join_gives_a_finite_token():
    token = ScaledToken(0.02)(torch.zeros(1, 8, requires_grad=True))
    token.sum().backward()
    assert torch.isfinite(token).all()


def test_the_choice_of_kernels_is_passed_on():
    with pytest.raises(ValueError, match="implementation is 'triton', but the tensors are on cpu"):
        make_projector(implementation="triton")(*inputs())


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"evidence": "all"}, "evidence is 'all', allowed are full, mid_only"), ({"heads": 0}, "evidence heads: 0")],
)
def test_wrong_settings_are_refused(changes, told):
    with pytest.raises(UserError, match=told):
        EvidenceProjector(8, 16, 32, **changes)
