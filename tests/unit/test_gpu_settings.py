"""What a GPU is told before its first use, and where an NF4 base goes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit

import aullm_dist
from aullm_dist.llm import backbone
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.monitoring.device import peak_flops
from aullm_dist.release.loading import pick_device
from aullm_dist.runtime.gpu import compute_float32_exactly, let_memory_grow


@pytest.fixture
def _rounding():
    """A process in which torch would round float32 to TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("_rounding")
@pytest.mark.parametrize("start", [compute_float32_exactly, lambda: pick_device("cpu")])
def test_float32_is_float32(start):
    start()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
    ],
)
def test_the_allocator_is_told_unless_the_user_has(before, after):
    let_memory_grow(before)
    assert before == after


def test_the_allocator_is_told_before_torch_is_imported():
    """Torch reads the variable once."""
    source = (Path(aullm_dist.__file__).parent / "train.py").read_text()
    assert source.index("let_memory_grow(os.environ)") < source.index("from aullm_dist.commands")
    code = "import sys, aullm_dist.runtime.gpu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_an_nf4_base_is_loaded_where_it_is_wanted(tiny_llm, monkeypatch, device):
    """The library alone would take the current GPU, whichever was asked for."""
    asked = {}
    real = backbone.AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments, device_map=None, **options):
        asked["device_map"] = device_map
        return real(*arguments, **options)

    monkeypatch.setattr(backbone.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    load_backbone(tiny_llm, BackboneOptions(quantization="nf4", device=torch.device(device)))
    assert asked["device_map"] == {"": device}
    load_backbone(tiny_llm, BackboneOptions(device=torch.device(device)))
    assert asked["device_map"] is None, "what is not packed is loaded on the host, and moved"


def test_the_library_takes_that_place(tiny_llm):
    model = load_backbone(tiny_llm, BackboneOptions(quantization="nf4", device=torch.device("cpu"))).model
    packed = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert packed
    assert {module.weight.device.type for module in packed} == {"cpu"}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_name_that_holds_another_name_is_another_gpu(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), "bf16") == peak
