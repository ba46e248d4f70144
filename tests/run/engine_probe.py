"""The main job with a look at what its steps and its checkpoints send, and at what the engine holds.

Started by test_engine_faults.

Writes PROBE_FOLDER/rank<k>.json, and aborts in the interpreter's clean-up, which a process of a group must not reach.
"""

import atexit
import inspect
import json
import os
import runpy
import sys
from collections import Counter
from pathlib import Path

import torch

TRAIN = Path(__file__).resolve().parents[2] / "aullm_dist" / "train.py"
facts = {"saves": [], "steps": []}
counters = []


def log_messages(name: str) -> None:
    """Count the bytes that each process has after a collective, in each step and each save.

    DeepSpeed's own communication logger does not see the gathering of a single parameter.
    """
    collective = getattr(torch.distributed, name)

    def counted(*args, **kwargs):
        if counters:
            output = inspect.signature(collective).bind(*args, **kwargs).args[0]
            for tensor in output if isinstance(output, list) else [output]:
                counters[-1][f"{name} {tensor.dtype}"] += tensor.nbytes
        return collective(*args, **kwargs)

    setattr(torch.distributed, name, counted)


def main() -> None:
    for name in ("all_gather", "all_gather_into_tensor", "broadcast", "all_reduce"):
        log_messages(name)
    from aullm_dist.distributed import engine
    from aullm_dist.training import fold, step

    def counting(what, work):
        def counted(*args, **kwargs):
            counters.append(Counter())
            result = work(*args, **kwargs)
            facts[what].append(counters.pop())
            return result

        return counted

    def watch_prepare(accelerator, model, optimizer):
        prepared = prepare(accelerator, model, optimizer)
        llm = list(model.reasoner.llm.parameters())
        facts["trainable_values"] = sum(p.ds_numel for p in model.parameters() if p.requires_grad)
        facts["frozen_bytes"] = sum(p.ds_numel * p.element_size() for p in llm if not p.requires_grad)
        embedding = model.reasoner.llm.get_input_embeddings().weight
        facts["embedding_bytes"] = embedding.ds_numel * embedding.element_size()
        facts["frozen_bytes_here"] = sum(
            p.numel() * p.element_size() + p.ds_tensor.numel() * p.element_size() for p in llm if not p.requires_grad
        )
        facts["trainable_dtypes"] = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
        return prepared

    fold.save_checkpoint = counting("saves", fold.save_checkpoint)
    step.TrainStep.run = counting("steps", step.TrainStep.run)
    prepare, engine.prepare = engine.prepare, watch_prepare
    atexit.register(os.abort)
    atexit.register(write)
    leave, os._exit = os._exit, lambda code: (write(), leave(code))
    sys.argv[0] = str(TRAIN)
    runpy.run_path(str(TRAIN), run_name="__main__")


def write() -> None:
    facts["destroyed"] = not torch.distributed.is_initialized()
    folder = Path(os.environ["PROBE_FOLDER"])
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(facts))


main()
