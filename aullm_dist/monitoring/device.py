"""Reads what the device could do and what it draws: operations of a token, peaks of known GPUs, power."""

import re

import torch
from torch import nn

from aullm_dist.llm.layers import decoder_layers
from aullm_dist.log import get_logger

logger = get_logger(__name__)

# Dense operations per second in bfloat16 and float32 (without TF32), by words of the name that torch gives; the more
# specific names come first. Source: NVIDIA's datasheets.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    ("B200", 2250e12, 75e12),
    ("GH200", 989e12, 67e12),
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100 NVL", 835e12, 60e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
    ("L40", 181e12, 90.5e12),
    ("A10G", 70e12, 35e12),
    ("A10", 125e12, 31.2e12),
    ("L4", 121e12, 30.3e12),
)


def flops_per_token(model: nn.Module) -> int:
    """Return floating-point operations of a training step per token in the LLM's linear layers; 0 without an LLM.

    A frozen weight counts 4 (forward, gradient of its input), a LoRA weight 6 (gradient of the weight as well).
    Attention, the visual backbone and what is recomputed in the backward pass are left out, as is usual for model
    FLOPs. Shapes alone are read, so parameters may be sharded or packed.
    """
    return sum(
        (6 if "lora_" in name else 4) * module.in_features * module.out_features
        for _, layer in decoder_layers(model)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    )


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return operations per second that a GPU can reach at most; None for GPUs that are not known, and for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    # Whole words: an L40 is no L4, and an RTX A1000 no A100.
    row = next((row for row in _PEAKS if re.search(rf"\b{row[0]}\b", name)), None)
    if row is None:
        return None
    return row[1] if precision == "bf16" else row[2]


class Power:
    """Power that a GPU draws, where NVML tells it.

    Args:
        device: the GPU; a CPU draws nothing that is known here.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml = self._handle = None
        if device.type != "cuda":
            return
        try:
            import pynvml
        except ImportError:
            logger.info("Power: not logged, nvidia-ml-py is not installed (pip install 'aullm-dist[cuda]')")
            return
        try:
            pynvml.nvmlInit()
            identity = str(torch.cuda.get_device_properties(device).uuid)
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity.removeprefix('GPU-')}".encode())
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            logger.info("Power: not logged, NVML says %s", error)

    def watts(self) -> dict[str, float]:
        """Return `power_watts`, or nothing where it is not known."""
        if self._nvml is None:
            return {}
        try:
            return {"power_watts": self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3}
        except self._nvml.NVMLError:
            self._nvml = None
            return {}
