"""What benchmarks/train_step.py runs: LLMs of true shapes with random weights, batches in memory, and what a step must
cost at least."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from aullm_dist.config import Config, load
from aullm_dist.data.clips import ClipView
from aullm_dist.data.corpora import CORPORA
from aullm_dist.data.protocols import SampleInfo
from aullm_dist.distributed.placement import Whole
from aullm_dist.llm import base_check
from aullm_dist.llm.pieces.skeleton import model_without_storage
from aullm_dist.llm.pieces.walk import owners
from aullm_dist.llm.stored import wrappers
from aullm_dist.llm.stored.weight_files import StoredTensor
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.model.assembly import BuiltModel
from aullm_dist.model.reasoner import Reasoner
from aullm_dist.packing.forward import per_branch_hidden
from aullm_dist.training.build import build_model

AUS = CORPORA["casme2"].aus
PATHS = ("packed", "padded", "per_branch")
NF4_READ_BYTES = 0.5 + 1 / 64
"""Of a weight in NF4 with double quantisation."""
NF4_WRITTEN_BYTES = 2
"""Of the bf16 weight that a matrix product wants."""
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
INTERVENTIONS = {1: (), 2: ("appearance",), 3: ("appearance", "structure"), 6: ("appearance", "structure", "neutral")}
"""Branches of a clip -> what is drawn for it; the neutral twin brings two crossed pairs with it."""


@dataclass(frozen=True)
class Case:
    """One shape of a step: clips with K branches each, P prefix and S suffix tokens (None: the shipped prompt's)."""

    clips: int = 16
    branches: int = 2
    prefix_tokens: int | None = 96
    suffix_tokens: int | None = 16
    paths: tuple[str, ...] = PATHS


# The first is the packing's target, the second the shipped prompt, the third has 2,048 tokens and more.
CASES = (Case(), Case(prefix_tokens=None, suffix_tokens=None), Case(clips=64, paths=("packed",)))


@dataclass(frozen=True)
class Preset:
    """An LLM and how it is held."""

    llm: str
    config: Callable[[], PretrainedConfig]
    quantization: str = "none"
    checkpointing: str = "none"
    precision: str = "bf16"
    cases: tuple[Case, ...] = CASES


def _llama(width: int, mlp: int, layers: int, heads: int, key_values: int, vocabulary: int = 128256) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_values, vocab_size=vocabulary, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters=dict(_LLAMA3_ROPE), tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


def _qwen3_32b() -> Qwen3Config:
    return Qwen3Config(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=40960, rms_norm_eps=1e-6, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6}, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip


_LLAMA_8B = functools.partial(_llama, 4096, 14336, 32, 32, 8)
PRESETS = {
    "tiny": Preset("Llama, width 256, 2 layers", functools.partial(_llama, 256, 896, 2, 4, 1, 1024), precision="fp32"),
    "8b-bf16": Preset("Llama 3.1 8B", _LLAMA_8B),
    "8b-nf4": Preset("Llama 3.1 8B", _LLAMA_8B, "nf4"),
    "32b-nf4": Preset("Qwen3 32B", _qwen3_32b, "nf4", "non_reentrant"),
    "70b-nf4": Preset(
        "Llama 3.1 70B", functools.partial(_llama, 8192, 28672, 80, 64, 8), "nf4", "non_reentrant"
    ),
}  # fmt: skip


def linear_weights(config: PretrainedConfig) -> int:
    """Return the weights of the decoder's linear layers: what every token is multiplied with."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * config.hidden_size * head * (config.num_attention_heads + config.num_key_value_heads)
    return config.num_hidden_layers * (attention + 3 * config.hidden_size * config.intermediate_size)


@dataclass(frozen=True)
class Floor:
    """What a step costs at least: arithmetic, and unpacking the weights where they are held in NF4."""

    flops: float
    unpacked_bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Return the shortest time on a device with these rates, one after the other."""
        return self.flops / flops_per_second + self.unpacked_bytes / bytes_per_second


def floor_of(weights: int, tokens: int, *, recomputed: bool, packed: bool) -> Floor:
    """Return the floor of a step through frozen weights.

    Args:
        weights: of the linear layers.
        tokens: that the LLM computes.
        recomputed: whether the forward pass runs again in the backward pass.
        packed: whether the weights are in NF4; each pass then reads and writes all of them.
    """
    passes = 3 if recomputed else 2
    unpacked = passes * weights * (NF4_READ_BYTES + NF4_WRITTEN_BYTES) if packed else 0.0
    return Floor(2.0 * passes * weights * tokens, unpacked)


class RandomFiles:
    """Random weights in the place of a model's files: every piece is drawn on the device when it is asked for."""

    def __init__(self, folder: Path | str, device: torch.device) -> None:
        config = AutoConfig.from_pretrained(folder)
        model = model_without_storage(config, torch.bfloat16, None)
        self.tensors = {
            name: StoredTensor(Path(folder), torch.bfloat16, tuple(getattr(module, own).shape), 0)
            for name, own, module in owners(model)
        }
        self.bytes_read = 0
        self._generator = torch.Generator(device).manual_seed(0)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def read(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return elements `first` to `last` (not included), flat, on the device."""
        device = self._generator.device
        self.bytes_read += (last - first) * self.tensors[name].dtype.itemsize
        if len(self.tensors[name].shape) == 1:
            return torch.ones(last - first, device=device)
        return torch.empty(last - first, device=device).normal_(0, 0.02, generator=self._generator)

    def close(self) -> None:
        """There is nothing to close."""


def settings_of(preset: Preset, options: object) -> list[str]:
    """Return the run-file settings of a preset as `section.key=value`."""
    chosen = {
        "model.llm": "random",
        "model.quantization": preset.quantization,
        "model.activation_checkpointing": options.checkpointing or preset.checkpointing,
        "model.attention": options.attention,
        "model.compile": options.compile,
        "model.suffix_multiple": options.suffix_multiple,
        "model.dropout": 0.0,
        "training.precision": preset.precision,
        "training.deterministic": "false" if options.nondeterministic else "true",
        "training.cpu_threads": options.threads or "null",
        "data.workers": options.workers,
    }
    return [f"{key}={value}" for key, value in chosen.items()]


def config_of(preset: Preset, case: Case, options: object) -> Config:
    """Return the configuration of a case: that of a run, with its interventions fixed."""
    drawn = INTERVENTIONS[case.branches]
    chances = {f"counterfactual.{name}_probability": float(name in drawn) for name in INTERVENTIONS[6]}
    batch = {"training.global_batch": case.clips, "training.micro_batch": case.clips}
    more = chances | batch | {"counterfactual.enabled": bool(drawn), "counterfactual.branches": len(drawn)}
    return load(None, [*settings_of(preset, options), *(f"{key}={value}" for key, value in more.items())])


def build(preset: Preset, folder: Path, accelerator: Accelerator, config: Config) -> BuiltModel:
    """Build the trainer's model by the trainer's code, its LLM drawn weight by weight into its place.

    No more than a few million weights are ever there unpacked, as when a run loads its LLM in pieces.
    """
    build_tiny_backbone(folder, hidden=32, layers=1, heads=2)
    (folder / "model.safetensors").unlink()
    preset.config().save_pretrained(folder)
    files = functools.partial(RandomFiles, device=accelerator.device)
    # There are no files to check.
    with mock.patch.object(wrappers, "WeightFiles", files), mock.patch.object(base_check, "check_files"):
        built = build_model(config, AUS, folder, Whole(accelerator))
    built.model.to(accelerator.device)
    generator = torch.Generator(accelerator.device).manual_seed(1)
    for name, parameter in built.model.named_parameters():
        if "lora_B" in name:
            # Zero at first, which would hide what LoRA does from the comparison of the paths.
            parameter.data.normal_(std=0.01, generator=generator)
    return built


def set_lengths(reasoner: Reasoner, case: Case, shipped: object) -> None:
    """Give the prompt P prefix and S suffix tokens, by repeating or cutting its text.

    Args:
        reasoner: of the model.
        case: what lengths.
        shipped: the prompt as it was built.
    """
    prompt = shipped
    if case.prefix_tokens is not None:
        prompt = replace(prompt, prefix_ids=_stretched(prompt.prefix_ids, case.prefix_tokens))
    if case.suffix_tokens is not None:
        others = prompt.suffix_tokens - len(prompt.question_ids)
        prompt = replace(prompt, question_ids=_stretched(prompt.question_ids, case.suffix_tokens - others))
    static = prompt.prefix_ids + prompt.structure_ids + prompt.question_ids
    reasoner.prompt = prompt
    reasoner.static_ids = torch.tensor(static, device=reasoner.static_ids.device)


def _stretched(ids: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (ids * -(-length // len(ids)))[:length]


@contextlib.contextmanager
def along(reasoner: Reasoner, path: str, clips: int) -> Iterator[None]:
    """Run the LLM along a path inside the block: `packed`, `padded`, or one forward of `clips` rows per branch."""
    reasoner.packing = path == "packed"
    if path == "per_branch":
        # Rows do not see each other, so it does not matter that a clip's branches stand side by side.
        reasoner.hidden = lambda prefix, suffix: per_branch_hidden(
            reasoner.llm, prefix, suffix, reasoner.prompt.readout_positions, clips=clips
        )
    try:
        yield
    finally:
        reasoner.packing = True
        reasoner.__dict__.pop("hidden", None)


def clips_in_memory(count: int, size: int, seed: int = 0) -> ClipView:
    """Return random clips of 12 frames, half of the AUs active in each."""
    rng = np.random.default_rng(seed)
    rows, samples = [], []
    for number in range(count):
        frames = rng.integers(0, 256, (12, size, size), dtype=np.uint8)
        name = f"random/{number:04d}"
        rows.append({
            "sample_id": name, "num_frames": 12, "height": size, "width": size, "frames": frames.tobytes(),
            "frame_numbers": list(range(12)),
        })  # fmt: skip
        active = tuple(au for au in AUS if rng.random() < 0.5)
        samples.append(SampleInfo(sample_id=name, subject="random", corpus="random", aus=active))
    return ClipView(rows, samples)


def trainables(model: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
