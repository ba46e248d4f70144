"""Under autocast no LoRA layer makes a float32 copy of its input, plain or in NF4; without it PEFT's cast stays."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch.utils._python_dispatch import TorchDispatchMode

from aullm_dist.llm.backbone import BackboneOptions, load_backbone


class Casts(TorchDispatchMode):
    """Count casts of activations from bfloat16 to float32."""

    def __init__(self):
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].dim() == 3:
            self.found += args[0].dtype == torch.bfloat16 and result.dtype == torch.float32
        return result


@pytest.fixture(params=["none", "nf4"])
def backbone(request, tiny_llm):
    options = BackboneOptions(dtype=torch.bfloat16, quantization=request.param, lora_rank=2, lora_dropout=0.1)
    return load_backbone(tiny_llm, options).model


def lora_layer(model):
    return next(module for module in model.modules() if isinstance(module, LoraLayer))


def test_autocast_alone_casts(backbone):
    layer = lora_layer(backbone).train()
    x = torch.randn(2, 3, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    with Casts() as casts, torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(x)
        result.sum().backward()
    assert casts.found == 0
    assert result.dtype == torch.bfloat16
    for parameter in layer.lora_B.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().sum() > 0


def test_without_dropout_the_answers_are_those_of_pefts_cast(backbone):
    layer = lora_layer(backbone).eval()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    x = torch.randn(2, 3, layer.in_features, dtype=torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ours = layer(x)
        layer._cast_input_dtype = lambda x, dtype: x.to(dtype)
        torch.testing.assert_close(ours, layer(x), rtol=0, atol=0)


def test_outside_of_autocast_float32_parameters_still_meet_float32(backbone):
    layer = lora_layer(backbone)
    x = torch.randn(2, 3, layer.in_features, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
