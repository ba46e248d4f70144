"""Ten types of backbone, packed with LoRA: two processes under DDP and ZeRO-3 train the function of one.

One of each kind that the engines see: plain, query-key norms, two masks, attention sinks and experts with biases,
latent attention with buffers in the files, fused experts, gated delta net, short convolution, Mamba-2 beside experts
and Mamba-2 beside attention.
"""

import json

import pytest
from tiny_backbones import write_any
from tiny_wrappers import write_wrapper
from training_runs import fork, overrides, partition_everything, scalars
from transformers.utils import logging as transformers_logging

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1500)]

TYPES = (
    "llama", "qwen3", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3_moe", "qwen3_5_text", "lfm2", "granitemoehybrid",
    "falcon_h1",
)  # fmt: skip


# In 4 bits, experts included.
PACKED = {"qwen3_moe": {"model__quantization": "nf4_experts", "model__activation_checkpointing": "non_reentrant"}}
# Inside their multimodal models, as they are published.
INSIDE = {"gemma3_text": "gemma3", "qwen3_5_text": "qwen3_5"}


@pytest.fixture(scope="module")
def runs(small_dataset, tiny_llm, tmp_path_factory):
    """Return a function that trains all types under a strategy, and gives the losses by type."""
    root = tmp_path_factory.mktemp("types")
    transformers_logging.disable_progress_bar()
    for name in TYPES:
        if name in INSIDE:
            write_wrapper(root / name, INSIDE[name], tiny_llm)
        else:
            write_any(root / name, name, tiny_llm, sliding_window=16)

    def give(strategy: str, processes: int) -> dict[str, list[float]]:
        folder = root / f"{processes}-{strategy.rpartition('/')[2]}"
        settings = {
            name: overrides(
                small_dataset, root / name, folder / name, training__processes=processes, training__global_batch=4,
                training__micro_batch=4 // processes, training__max_steps=3, training__evaluate_every_epochs=9,
                model__dropout=0.0, model__readout="last", counterfactual__branches=1,
                data__folds=2, data__inner_fraction=0.0, **PACKED.get(name, {}),
            )
            for name in TYPES
        }  # fmt: skip
        file = root / f"{folder.name}.json"
        file.write_text(json.dumps(settings))
        program = __file__.replace("test_backbone_types", "many_backbones")
        result = fork(strategy, str(file), processes=processes, program=type(root)(program))
        assert result.returncode == 0, result.stderr
        return {name: scalars(folder / name, "loss/loss") for name in TYPES}

    return give


def test_two_processes_train_what_one_trains(runs, tmp_path):
    alone = runs("ddp", 1)
    assert all(len(losses) == 3 for losses in alone.values())
    assert len({losses[-1] for losses in alone.values()}) == len(TYPES), "every type computes something of its own"
    for strategy in ("ddp", str(partition_everything(tmp_path))):
        found = runs(strategy, 2)
        for name, losses in alone.items():
            assert found[name] == pytest.approx(losses, rel=1e-5), (name, strategy)
