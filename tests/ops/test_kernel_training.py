"""A training run through the kernels is the run through plain PyTorch."""

import pytest
import torch
from aullm_kernels import dispatch
from kernel_tools import DEVICE, KERNELS
from training_runs import overrides, scalars, train_here

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = pytest.mark.filterwarnings("ignore:.*FP fusion.*")


def test_a_run_with_the_kernels_equals_one_without(tiny_dataset, tiny_llm, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    curves = {}
    for kernels in ("torch", KERNELS):
        monkeypatch.setattr(dispatch, "_logged", set())
        settings = {
            "model__kernels": kernels,
            "model__graph_heads": 1,
            "model__dropout": 0.0,
            "model__lora_dropout": 0.0,
            "training__max_steps": 2,
            "training__global_batch": 2,
            "training__micro_batch": 2,
            "training__evaluate_every_epochs": 99,
            "data__inner_fraction": 0.0,
        }
        assert train_here(*overrides(tiny_dataset, tiny_llm, tmp_path / kernels, **settings)) == 0
        told = capsys.readouterr().err
        for op in ("evidence_pool", "graph_attention"):
            assert f"{op}: implementation={kernels} reason=asked for by implementation" in told
        curves[kernels] = [torch.tensor(scalars(tmp_path / kernels, tag)) for tag in ("loss/loss", "train/grad_norm")]
    for found, expected in zip(curves[KERNELS], curves["torch"], strict=True):
        assert len(found) == len(expected) > 0
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_a_run_that_asks_for_triton_without_a_gpu_is_refused(tiny_dataset, tiny_llm, tmp_path, capsys):
    assert train_here(*overrides(tiny_dataset, tiny_llm, tmp_path / "run", model__kernels="triton")) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert (
        "implementation is 'triton', but the tensors are on cpu, triton runs on cuda; auto and torch can run" in message
    )
    assert not (tmp_path / "run").exists()


def test_the_model_joins_evidence_and_summary_in_the_kernel(monkeypatch):
    """The projector asks for the join instead of concatenating; with the kernels it is the same token."""
    from aullm_dist.model.projector import EvidenceProjector

    torch.manual_seed(0)
    projector = EvidenceProjector(8, 16, 24, cell_grid=(1, 3, 3), heads=2, implementation="torch").eval().to(DEVICE)
    cells, high = torch.randn(2, 9, 8, device=DEVICE), torch.randn(2, 16, device=DEVICE)
    expected = projector(cells, high).token
    monkeypatch.setattr(torch, "cat", lambda *_, **__: pytest.fail("the parts are joined outside the kernel"))
    projector.implementation = KERNELS
    torch.testing.assert_close(projector(cells, high).token, expected, rtol=1e-5, atol=1e-6)
