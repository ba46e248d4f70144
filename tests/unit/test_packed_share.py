"""How much of an LLM is in 4 bits: what is said from its config is what loading it makes."""

import pytest
import torch
from tiny_backbones import write_any
from transformers import AutoConfig

from aullm_dist.cli import main
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.llm.quantization import packed_share
from aullm_dist.packing.forward import decoder_of
from aullm_dist.planning.packed_share import describe_share, in_gb, share_in_nf4

WIDE = {"moe_intermediate_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tiny_llm, tmp_path_factory):
    place = tmp_path_factory.mktemp("share") / "llm"
    write_any(place, "qwen3_moe", tiny_llm, **WIDE)
    return place


@pytest.mark.parametrize("quantization", ["nf4", "nf4_experts"])
def test_what_is_said_is_what_is_loaded(folder, quantization):
    options = BackboneOptions(quantization=quantization, lora_rank=0, dtype=torch.bfloat16)
    backbone = load_backbone(folder, options)
    packed, plain = packed_share(decoder_of(backbone.model).parameters())
    share = share_in_nf4(backbone.config, experts=quantization == "nf4_experts")
    assert (share.packed_bytes, share.plain_bytes) == (packed, plain)
    assert (share.experts == 0) == (quantization == "nf4_experts")


def test_the_doctor_says_it_and_why_not(folder, tmp_path, capsys):
    said = describe_share(str(folder))
    assert said.startswith(
        f"qwen3_moe, in NF4: {in_gb(share_in_nf4(AutoConfig.from_pretrained(folder)).packed_bytes)} in 4 bits, "
    )
    assert "fused experts, which model.quantization=nf4_experts packs as well" in said
    command = ["doctor", "--quick", "--folder", str(tmp_path), "--llm"]
    main([*command, str(folder)])
    assert said in " ".join(capsys.readouterr().out.split())
    assert main([*command, str(tmp_path / "none")]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL llm")]
    assert "no such folder" in line
    assert "Traceback" not in line
