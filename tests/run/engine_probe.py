"""The main job with a look at what its checkpoints send, and at what the engine holds; started by test_engine_faults.

Writes PROBE_FOLDER/rank<k>.json, and aborts in the interpreter's clean-up, which a process of a group must not reach.
"""

import atexit
import inspect
import json
import os
import runpy
import sys
from pathlib import Path

import torch

TRAIN = Path(__file__).resolve().parents[2] / "aullm_dist" / "train.py"
facts = {}


def log_messages(name: str) -> None:
    """Count the bytes that each process has after a collective, while a checkpoint is saved.

    DeepSpeed's own communication logger does not see the gathering of a single parameter.
    """
    collective = getattr(torch.distributed, name)

    def counted(*args, **kwargs):
        if facts.get("saving"):
            output = inspect.signature(collective).bind(*args, **kwargs).args[0]
            tensors = output if isinstance(output, list) else [output]
            facts["gathered_by_saves"][-1] += sum(tensor.nbytes for tensor in tensors)
        return collective(*args, **kwargs)

    setattr(torch.distributed, name, counted)


def main() -> None:
    for name in ("all_gather", "all_gather_into_tensor", "broadcast", "all_reduce"):
        log_messages(name)
    from aullm_dist.training import engine, fold

    def watch_save(*args, **kwargs):
        facts.setdefault("gathered_by_saves", []).append(0)
        facts["saving"] = True
        folder = save(*args, **kwargs)
        facts["saving"] = False
        return folder

    def watch_prepare(accelerator, model, optimizer):
        prepared = prepare(accelerator, model, optimizer)
        llm = list(model.reasoner.llm.parameters())
        facts["trainable_values"] = sum(p.ds_numel for p in model.parameters() if p.requires_grad)
        facts["frozen_bytes"] = sum(p.ds_numel * p.element_size() for p in llm if not p.requires_grad)
        facts["frozen_bytes_here"] = sum(
            p.numel() * p.element_size() + p.ds_tensor.numel() * p.element_size() for p in llm if not p.requires_grad
        )
        facts["trainable_dtypes"] = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
        return prepared

    save, fold.save_checkpoint = fold.save_checkpoint, watch_save
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
