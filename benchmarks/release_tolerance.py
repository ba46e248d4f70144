"""How far apart one model's answers to the probe clips of a release are when they are computed in other ways.

    python benchmarks/release_tolerance.py [--json FILE]

The ways are those that two machines may differ in: packed and padded, the attentions, one and two threads, and the GPU
where there is one. Weights are random (the tiny backbone at the given sizes, LoRA with values), so that nothing is
downloaded. Each row is the largest difference of a logit from the first way, beside the tolerance of
`aullm-dist release verify` in that dtype.
"""

import argparse
import logging
import tempfile
from pathlib import Path

import torch
from common import commit, cpu_name, gpu_names, markdown_table, versions, write_json

from aullm_dist.config import Config
from aullm_dist.data.corpora import CORPORA
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.release.probe import TOLERANCES, answer_probe, probe_clips
from aullm_dist.training.build import build_model

SIZES = ((128, 4), (512, 24))
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
# Packing, attention, threads, device.
WAYS = (
    (True, "auto", 1, "cpu"),
    (True, "auto", 2, "cpu"),
    (True, "sdpa", 1, "cpu"),
    (True, "eager", 1, "cpu"),
    (False, "sdpa", 1, "cpu"),
    (False, "eager", 1, "cpu"),
    (True, "auto", 1, "cuda"),
    (False, "sdpa", 1, "cuda"),
)


def answers(llm: Path, precision: str, way: tuple[bool, str, int, str]) -> torch.Tensor:
    """Return the logits `[clips, A]` of the model of a seed, computed in one way."""
    packing, attention, threads, device = way
    config = Config().changed({"model.packing": packing, "model.attention": attention, "training.precision": precision})
    torch.set_num_threads(threads)
    model = build_model(config, CORPORA["casme2"].aus, llm).model
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return answer_probe(model.to(device).eval(), probe_clips(config.data.num_frames, config.data.size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    rows = []
    for width, layers in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            llm = build_tiny_backbone(Path(folder) / "llm", hidden=width, layers=layers, heads=8)
            for precision, dtype in PRECISIONS.items():
                first = answers(llm, precision, WAYS[0])
                for way in WAYS[1:]:
                    if way[3] == "cuda" and not torch.cuda.is_available():
                        continue
                    difference = float((answers(llm, precision, way) - first).abs().max())
                    packing, attention, threads, device = way
                    rows.append(
                        {
                            "LLM": f"{width} x {layers}",
                            "dtype": dtype,
                            "way": f"{'packed' if packing else 'padded'}, {attention}, {threads} thread(s), {device}",
                            "largest logit": f"{float(first.abs().max()):.2f}",
                            "difference": f"{difference:.1e}",
                            "tolerance": f"{TOLERANCES[dtype]:g}",
                        }
                    )
    header = tuple(rows[0])
    print("\n".join(markdown_table(header, [tuple(row.values()) for row in rows], left=3)))
    packages = ("torch", "transformers", "peft")
    machine = {"cpu": cpu_name(), "gpus": gpu_names(), "versions": versions(packages), "commit": commit()}
    print(machine)
    if args.json:
        write_json(args.json, {**machine, "rows": rows})


if __name__ == "__main__":
    main()
