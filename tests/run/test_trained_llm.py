"""A trained LLM, where the others are random: it still knows what it learnt, packed as padded, and in NF4."""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM, AutoTokenizer

from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.model.prompt import build_prompt
from aullm_dist.model.reasoner import Reasoner
from aullm_dist.packing.forward import packed_hidden, padded_hidden

QUESTION = "The capital of France is"


@pytest.fixture(scope="module")
def plain(trained_llm):
    return AutoModelForCausalLM.from_pretrained(trained_llm, dtype=torch.float32).eval()


@torch.no_grad()
def continuation(model, folder, tokens=4):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :])


def test_it_knows_the_capital_of_france(plain, trained_llm):
    assert "Paris" in continuation(plain, trained_llm)


def test_packed_branches_are_padded_rows(trained_llm):
    """On weights with the outliers of training, which random ones have not."""
    backbone = load_backbone(trained_llm, BackboneOptions(lora_rank=2))
    reasoner = Reasoner(backbone, build_prompt((1, 2, 4, 12), backbone.tokenizer)).eval()
    generator = torch.Generator().manual_seed(0)
    content, instruction = (0.1 * torch.randn(n, backbone.hidden_size, generator=generator) for n in (2, 2))
    branches = torch.tensor([[0, 0], [1, 1], [0, 1]])
    with torch.no_grad():
        prefix, suffix = reasoner._embeds(content, instruction, branches)
        places = range(suffix.shape[1])
        packed, padded = (run(reasoner.llm, prefix, suffix, places) for run in (packed_hidden, padded_hidden))
    assert ((packed - padded).norm() / padded.norm()).item() < 1e-5


@torch.no_grad()
def test_it_knows_it_in_nf4_as_well(plain, trained_llm):
    """And is what NF4 makes of its weights: the plain model with them dequantised is the oracle."""
    options = BackboneOptions(quantization="nf4", lora_rank=0, packing=False, attention="sdpa")
    backbone = load_backbone(trained_llm, options)
    assert len(backbone.quantized_modules) == 30 * 7
    assert "Paris" in continuation(backbone.model, trained_llm)
    ids = backbone.tokenizer(QUESTION, return_tensors="pt")["input_ids"]
    found, exact = (model(input_ids=ids).logits for model in (backbone.model, plain))
    oracle = copy.deepcopy(plain)
    for name in backbone.quantized_modules:
        packed, dense = backbone.model.get_submodule(name).weight, oracle.get_submodule(name).weight
        dense.copy_(dequantize_4bit(packed.data, packed.quant_state).view_as(dense))
    rounded = oracle(input_ids=ids).logits
    assert (found - rounded).norm() < 1e-4 * rounded.norm()
    # Of a trained LLM the rounding shows.
    assert (found - exact).norm() > 1e-2 * exact.norm()
