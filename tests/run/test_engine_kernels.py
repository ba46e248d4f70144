"""The kernels under ZeRO-3, which takes the parameters away between a forward and its backward pass."""

import pytest
import torch
from kernel_tools import KERNELS
from training_runs import fork, overrides, partition_everything, scalars

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = pytest.mark.launch


def test_a_divided_model_trains_through_the_kernels_what_it_trains_without(small_dataset, tiny_llm, tmp_path):
    curves = {}
    for kernels in ("torch", KERNELS):
        settings = overrides(
            small_dataset, tiny_llm, tmp_path / kernels, training__strategy=partition_everything(tmp_path),
            training__processes=2, training__global_batch=4, training__micro_batch=2, training__max_steps=2,
            training__evaluate_every_epochs=99, model__kernels=kernels, model__graph_heads=1, model__dropout=0.0,
            data__inner_fraction=0.0,
        )  # fmt: skip
        result = fork(*settings, processes=2)
        assert result.returncode == 0, result.stderr
        for op in ("evidence_pool", "graph_attention"):
            assert f"{op}: implementation={kernels}" in result.stderr
        curves[kernels] = [torch.tensor(scalars(tmp_path / kernels, tag)) for tag in ("loss/loss", "train/grad_norm")]
    for found, expected in zip(curves[KERNELS], curves["torch"], strict=True):
        assert len(found) == len(expected) == 2
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
