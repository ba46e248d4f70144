"""Rounding errors of an LLM's own weights: packed against padded branches, and NF4 and bf16 against float32.

    python benchmarks/backbone_errors.py LLM [LLM ...]

Each LLM is a local folder; one thread, on the CPU. Prints a Markdown table. `packed` is the self-check that a run does
at its start, the largest relative deviation of a branch's readout, or what it was refused for. Errors of logits are
Frobenius norms over the last 16 positions of the prompt's prefix, relative to float32 with the same weights, each
position's mean taken off, which no probability sees; of weights, over all linear layers that NF4 packs.
"""

import argparse
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from common import markdown_table
from torch import Tensor, nn

from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import Backbone, BackboneOptions, load_backbone
from aullm_dist.model.prompt import Prompt, build_prompt
from aullm_dist.model.reasoner import Reasoner

AUS = (1, 2, 4, 7, 12, 14, 15, 17)
POSITIONS = 16


def main() -> int:
    """Measure each LLM and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llm", nargs="+", type=Path, metavar="LLM")
    torch.set_num_threads(1)
    head = ["LLM", "packed, fp32", "packed, bf16", "logits, bf16", "weights, NF4", "logits, NF4"]
    print("\n".join(markdown_table(head, [_row(llm) for llm in parser.parse_args().llm])))
    return 0


def _row(llm: Path) -> list[str]:
    exact = load_backbone(llm, BackboneOptions(lora_rank=0))
    expected = _logits(exact)
    short = load_backbone(llm, BackboneOptions(lora_rank=0, dtype=torch.bfloat16))
    in_nf4 = load_backbone(llm, BackboneOptions(lora_rank=0, quantization="nf4"))
    return [
        llm.name,
        _packed(exact),
        _packed(short),
        f"{_relative(_logits(short), expected):.1e}",
        f"{_weights(in_nf4, exact):.1e}",
        f"{_relative(_logits(in_nf4), expected):.1e}",
    ]


def _prompt(backbone: Backbone) -> Prompt:
    return build_prompt(AUS, backbone.tokenizer)


def _packed(backbone: Backbone) -> str:
    try:
        return f"{Reasoner(backbone, _prompt(backbone)).self_check():.1e}"
    except UserError as error:
        return f"refused: {error}"


@torch.no_grad()
def _logits(backbone: Backbone) -> Tensor:
    ids = torch.tensor(_prompt(backbone).prefix_ids)[None]
    logits = backbone.model(input_ids=ids).logits[0, -POSITIONS:].float()
    return logits - logits.mean(dim=-1, keepdim=True)


def _weights(in_nf4: Backbone, exact: Backbone) -> float:
    modules: list[tuple[nn.Module, nn.Module]] = [
        (in_nf4.model.get_submodule(name), exact.model.get_submodule(name)) for name in in_nf4.quantized_modules
    ]
    found = [bnb.dequantize_4bit(packed.weight.data, packed.weight.quant_state).float() for packed, _ in modules]
    wanted = [plain.weight.float() for _, plain in modules]
    return _relative(torch.cat([each.flatten() for each in found]), torch.cat([each.flatten() for each in wanted]))


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    sys.exit(main())
