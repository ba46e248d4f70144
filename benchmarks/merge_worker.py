"""One way of benchmarks/merge.py in a process of its own: writes a merged LLM and says what time and memory it took."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from aullm_dist.data.corpora import CORPORA
from aullm_dist.files import force_to_disk
from aullm_dist.llm.quantization import nf4_config
from aullm_dist.merge.memory import PeakMemory
from aullm_dist.merge.merge import merge_llm
from aullm_dist.wording import prefix_text

PROMPT = prefix_text(CORPORA["casme2"].aus)


def copy(base: Path, out: Path) -> None:
    """Copy the weights, as any tool would."""
    out.mkdir()
    for path in base.glob("*.safetensors"):
        shutil.copyfile(path, out / path.name)


def peft(base: Path, checkpoint: Path, out: Path, nf4: bool) -> None:
    """Merge by PEFT's own means; beside an NF4 base it merges into NF4, rounding once more."""
    quantization = {"quantization_config": nf4_config(torch.bfloat16)} if nf4 else {}
    llm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, **quantization)
    PeftModel.from_pretrained(llm, checkpoint).merge_and_unload().save_pretrained(out)


def main(mode: str, base: Path, checkpoint: Path, out: Path, max_ram: int, report: Path) -> None:
    """Measure one way: seconds until the command would return, and until everything is on disk."""
    transformers.utils.logging.disable_progress_bar()
    row: dict[str, object] = {"mode": mode}
    started = time.monotonic()
    with PeakMemory() as peak:
        if mode == "copy":
            copy(base, out)
        elif mode in ("peft", "peft-nf4"):
            peft(base, checkpoint, out, mode == "peft-nf4")
        elif mode == "probe":
            row["receipt"] = merge_llm(checkpoint, out, max_ram=max_ram, probe=[PROMPT]).as_dict()
        else:
            row["receipt"] = merge_llm(checkpoint, out, base=mode, max_ram=max_ram).as_dict()
    row["returned"] = time.monotonic() - started
    for path in out.iterdir():
        force_to_disk(path)
    row["on_disk"] = time.monotonic() - started
    row["peak_bytes"], row["max_ram_bytes"] = peak.bytes, max_ram
    row["cpu_seconds"] = time.process_time()
    report.write_text(json.dumps(row))


if __name__ == "__main__":
    mode, base, checkpoint, out, max_ram, report = sys.argv[1:]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(mode, Path(base), Path(checkpoint), Path(out), int(max_ram), Path(report))
