"""A model small enough to checkpoint hundreds of times, with every kind of tensor that the real one has."""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from aullm_dist.checkpoint.base_identity import base_identity
from aullm_dist.checkpoint.store import RunFacts, read_checkpoint, save_checkpoint

WIDTH = 16
AUS = [1, 4, 12]
CONFIG = {"model": {"llm": "tiny"}, "training": {"seed": 0}}

FILES = {
    "MANIFEST.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "aullm_config.json",
    "aullm_modules.safetensors",
    "optimizer.safetensors",
    "trainer_state.json",
}
MODEL_CONFIG = {"aus": AUS, "readout": "last"}
LLM_CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=WIDTH,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
BASE = base_identity("org/tiny", LLM_CONFIG.to_dict(), None)


def plain_llm() -> LlamaForCausalLM:
    """The same frozen weights each time, as if read from one folder."""
    with torch.random.fork_rng():
        torch.manual_seed(99)
        return LlamaForCausalLM(LLM_CONFIG).eval()


class Reasoner(nn.Module):
    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm = llm
        self.au_head = nn.Linear(WIDTH, len(AUS))


class TinyModel(nn.Module):
    adapter_prefix = "reasoner.llm"

    def __init__(self, *, rank: int = 4, alpha: int = 8, head: bool = True, lora: bool = True, **lora_options) -> None:
        super().__init__()
        llm = plain_llm() if head else plain_llm().model
        llm.requires_grad_(False)
        if lora:
            targets = ["q_proj", "v_proj", "down_proj"]
            llm = get_peft_model(llm, LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **lora_options))
        self.visual = nn.Conv3d(1, WIDTH, 3)
        self.strength = nn.Parameter(torch.randn(5))
        self.unused = nn.Parameter(torch.randn(2))
        self.frozen_gain = nn.Parameter(torch.randn(WIDTH), requires_grad=False)
        self.register_buffer("edges", torch.randint(0, 9, (2, 5)))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.reasoner = Reasoner(llm)

    def peft_model(self) -> nn.Module:
        return self.reasoner.llm

    def forward(self, clips: Tensor) -> Tensor:
        """`[B, 1, 3, 4, 4]` -> logits `[B, A]`."""
        tokens = self.visual(clips).flatten(2).transpose(1, 2) * self.frozen_gain
        tokens = tokens * self.strength.mean()
        hidden = self.reasoner.llm(inputs_embeds=tokens, output_hidden_states=True).hidden_states[-1]
        return self.reasoner.au_head(hidden[:, -1])


class NoLLM(nn.Module):
    adapter_prefix = ""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(6, len(AUS))

    def peft_model(self) -> None:
        return None


def build(seed: int = 0, *, optimizer_options: dict | None = None, **options) -> tuple[TinyModel, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = TinyModel(**options)
    trainables = [param for param in model.parameters() if param.requires_grad]
    groups = [{"params": trainables[:3], "weight_decay": 0.1}, {"params": trainables[3:], "weight_decay": 0.0}]
    return model, torch.optim.AdamW(groups, lr=1e-2, **(optimizer_options or {}))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Optimizer steps `first..last - 1`, each on data that its number alone decides."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(2, 1, 3, 4, 4, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(root, step: int, model: nn.Module, optimizer, **changes):
    facts = {key: changes.pop(key) for key in ("config", "model_config", "base") if key in changes}
    run = RunFacts(**{"config": CONFIG, "model_config": MODEL_CONFIG, "base": BASE, **facts})
    state = changes.pop("state", {"consumed_samples": 2 * step, "epoch": 0, "best": {"f1_macro": 0.5}})
    return save_checkpoint(root, step, model=model, optimizer=optimizer, state=state, run=run, **changes)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """The bits of every tensor that training can change."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, param in model.named_parameters():
        for key, value in optimizer.state.get(param, {}).items():
            tensors[f"{name}.{key}"] = value
    return {name: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def load_checkpoint(folder, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **expected):
    """Restore a model, and the optimizer if given, as a resume does; returns the trainer's state."""
    saved = read_checkpoint(folder, model, with_optimizer=optimizer is not None, **expected)
    saved.apply(optimizer)
    return saved.trainer


def write_two(root):
    """Write the checkpoints of steps 1 and 2 of one run."""
    model, optimizer = build()
    for step in (1, 2):
        train(model, optimizer, step - 1, step)
        save(root, step, model, optimizer)
    return root


def flip(path) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)
