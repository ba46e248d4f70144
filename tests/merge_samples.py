"""Checkpoints with LoRA on tiny backbones, and what stock PEFT makes of them."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aullm_dist.checkpoint.base_identity import base_identity
from aullm_dist.checkpoint.store import RunFacts, save_checkpoint
from aullm_dist.llm.backbone import Backbone
from aullm_dist.llm.quantization import nf4_config, prepare, quantized_modules

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class _Holder(nn.Module):
    adapter_prefix = "llm"

    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm = llm
        self.head = nn.Linear(2, 2)

    def peft_model(self) -> nn.Module:
        return self.llm


def write_checkpoint(root: Path, llm: Path, precision: str = "bf16", nf4: bool = False, **lora: object) -> Path:
    """Write a checkpoint whose LoRA moves every weight, and return it."""
    dtype = DTYPES[precision]
    options = {"quantization_config": nf4_config(dtype)} if nf4 else {}
    model = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype, **options)
    config = model.config.to_dict()
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | lora
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        wrapped = get_peft_model(model.requires_grad_(False), LoraConfig(**settings))
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.05)
            elif "magnitude" in name:
                parameter.data.mul_(1 + 0.1 * torch.rand_like(parameter))
    return save_checkpoint(
        root,
        1,
        model=_Holder(wrapped),
        optimizer=None,
        state={},
        run=RunFacts(
            config={"training": {"precision": precision}},
            model_config={"aus": [1], "prompt": "Action units under test: lip corner puller. Evidence:<CT>"},
            base=base_identity(str(llm), config, llm),
            quantized_modules=quantized_modules(model) if nf4 else (),
        ),
    )


def checkpoint_of(root: Path, backbone: Backbone, llm: Path, precision: str = "fp32") -> Path:
    """Write a checkpoint of a loaded backbone whose LoRA moves every weight, and return it."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in backbone.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return save_checkpoint(
        root,
        1,
        model=_Holder(backbone.model),
        optimizer=None,
        state={},
        run=RunFacts(
            config={"training": {"precision": precision}},
            model_config={"aus": [1], "prompt": "Action units under test: lip corner puller. Evidence:<CT>"},
            base=base_identity(str(llm), backbone.config.to_dict(), llm),
            quantized_modules=backbone.quantized_modules,
        ),
    )


def peft_merged(checkpoint: Path, llm: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return what PEFT's own merge holds, by the names of the plain LLM."""
    base = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype)
    return PeftModel.from_pretrained(base, checkpoint).merge_and_unload().state_dict()


def live_model(checkpoint: Path, llm: Path, dtype: torch.dtype) -> nn.Module:
    """Return the NF4 model with its adapter beside it, as it was trained."""
    base = AutoModelForCausalLM.from_pretrained(llm, dtype=dtype, quantization_config=nf4_config(dtype))
    prepare(base, dtype)
    return PeftModel.from_pretrained(base, checkpoint).eval()


def differing(found: dict[str, Tensor], expected: dict[str, Tensor], same: Callable = torch.equal) -> list[str]:
    """Return the names of tensors that are not the same, after checking that the names are."""
    assert found.keys() == expected.keys()
    return [name for name, tensor in expected.items() if not same(found[name], tensor)]
