"""One rank of benchmarks/load_memory.py: loads an LLM in one way, trains two steps, and writes what memory it took."""

import json
import os
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from aullm_dist.config.schema import TrainingConfig
from aullm_dist.distributed import context, engine
from aullm_dist.distributed.placement import placement_of
from aullm_dist.llm import quantization
from aullm_dist.llm.pieces.loading import load_in_pieces
from aullm_dist.llm.stored.weight_files import WeightFiles
from aullm_dist.packing.forward import decoder_of
from aullm_dist.runtime.exits import leave

STEPS = 2
PERIOD_SECONDS = 0.02
MIB = 2**20


class Sampler(threading.Thread):
    """Samples this process's memory; the highest value since the last `peak` is kept."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._peak = (0.0, 0.0)
        self._lock = threading.Lock()

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            self.sample()
            time.sleep(PERIOD_SECONDS)

    def sample(self) -> tuple[float, float]:
        """Return MiB of anonymous and shared memory, and of pages backed by files."""
        now = memory()
        with self._lock:
            self._peak = (max(self._peak[0], now[0]), max(self._peak[1], now[1]))
        return now

    def peak(self) -> tuple[float, float]:
        """Return the highest values since the last call."""
        self.sample()
        with self._lock:
            peak, self._peak = self._peak, (0.0, 0.0)
        return peak


def memory() -> tuple[float, float]:
    """Return MiB of RssAnon + RssShmem and of RssFile of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return (kib["RssAnon"] + kib["RssShmem"]) / 1024, kib["RssFile"] / 1024


class SoftInputs(nn.Module):
    """A frozen decoder with trained vectors among its inputs, as soft tokens are."""

    def __init__(self, llm: nn.Module, branches: int, soft: int) -> None:
        super().__init__()
        self.llm = llm
        self.soft = nn.Parameter(torch.randn(branches, soft, llm.config.hidden_size) * 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Return a loss of token ids `[B, T]`, whose first inputs are the trained vectors."""
        words = self.llm.get_input_embeddings()(ids)
        soft = self.soft.to(words.dtype)
        inputs = torch.cat([soft, words[:, soft.shape[1] :]], dim=1)
        hidden = decoder_of(self.llm)(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return hidden.float().square().mean()


def load(mode: str, base: str, accelerator: Accelerator, deepspeed: dict) -> tuple[nn.Module, int]:
    """Return the LLM, and the bytes of weights that this rank has read (0 where nobody counts them)."""
    config = AutoConfig.from_pretrained(base)
    packing = quantization.nf4_config(torch.bfloat16)
    if mode == "ordinary":
        llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=packing)
        read = 0
    else:
        readers: list[WeightFiles] = []
        close = WeightFiles.close
        WeightFiles.close = lambda files: (readers.append(files), close(files))[1]
        llm = load_in_pieces(
            base, config, torch.bfloat16, placement_of(accelerator, deepspeed), packing, mode == "prepared"
        )
        read = sum(files.bytes_read for files in readers)
    llm.requires_grad_(False)
    quantization.prepare(llm, torch.bfloat16)
    llm.activation_checkpointing_enable({"use_reentrant": False})
    llm.disable_input_require_grads()
    return llm, read


def main(mode: str, base: str, strategy: str, branches: int, tokens: int, results: str) -> None:
    """Measure one way of loading on this rank."""
    training = TrainingConfig(
        strategy=strategy, precision="bf16", micro_batch=1, global_batch=int(os.environ["WORLD_SIZE"]), cpu_threads=1
    )
    accelerator = context.start(training)
    deepspeed = engine.resolved(training, accelerator.num_processes)
    # What the libraries make once belongs to the baseline: gloo's connections, bitsandbytes' own import.
    dist.all_reduce(torch.ones(1))
    quantization.pack(torch.ones(64), quantization.nf4_config(torch.bfloat16))
    sampler = Sampler()
    sampler.start()
    accelerator.wait_for_everyone()
    row: dict[str, object] = {"rank": accelerator.process_index, "baseline": sampler.sample()}
    sampler.peak()
    started = time.monotonic()
    llm, row["bytes_read"] = load(mode, base, accelerator, deepspeed)
    row["seconds"] = time.monotonic() - started
    row["loaded"] = sampler.sample()
    model = SoftInputs(llm, branches, 4)
    model.train()
    wrapped, optimizer = engine.prepare(accelerator, model, torch.optim.AdamW([model.soft], lr=1e-3))
    del llm
    row["divided"] = sampler.sample()
    row["peak_load"] = sampler.peak()
    ids = torch.randint(0, 1000, (branches, tokens), generator=torch.Generator().manual_seed(accelerator.process_index))
    losses = []
    for _ in range(STEPS):
        loss = wrapped(ids)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    row["peak_step"] = sampler.peak()
    row["after_step"] = sampler.sample()
    row["losses"] = losses
    accelerator.wait_for_everyone()
    Path(results, f"{mode}-{row['rank']}.json").write_text(json.dumps(row))
    context.stop(accelerator)
    leave(0)


if __name__ == "__main__":
    mode, base, strategy, branches, tokens, results = sys.argv[1:]
    main(mode, base, strategy, int(branches), int(tokens), results)
