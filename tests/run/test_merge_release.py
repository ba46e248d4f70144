"""`aullm-dist merge` writes release folders of both formats, and they are what was trained."""

import csv

import pytest
from release_samples import write_run
from tiny_backbones import write_any
from tiny_wrappers import write_wrapper
from transformers import AutoModelForCausalLM

from aullm_dist.cli import main
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.release.layout import read_release_manifest

pytestmark = pytest.mark.launch


def test_release_folders_of_both_formats(tiny_dataset, tmp_path):
    llm = build_tiny_backbone(tmp_path / "llm", hidden=64, layers=2, heads=2)
    checkpoint = write_run(tmp_path / "run", tiny_dataset, llm, quantization="nf4")
    for form in ("adapter", "merged"):
        out = tmp_path / form
        options = [
            "--format",
            form,
            "--dtype",
            "fp32",
            *(["--probe"] if form == "merged" else []),
            "--author",
            "Ada Author",
            "--author",
            "Ben Builder",
        ]
        assert main(["merge", str(checkpoint.parent.parent), "--out", str(out), *options]) == 0
        assert main(["release", "verify", str(out)]) == 0
        assert not (tmp_path / f"{form}.partial").exists()
        citation = (out / "CITATION.cff").read_text()
        assert citation.index("Author") < citation.index("Builder")
        assert main(["predict", str(out), str(tiny_dataset), "--out", str(tmp_path / f"{form}.csv")]) == 0
    adapter, merged = (rows_in(tmp_path / f"{form}.csv") for form in ("adapter", "merged"))
    assert adapter.keys() == merged.keys()
    assert len(adapter) > 8
    assert max(abs(adapter[key] - merged[key]) for key in adapter) < 1e-3
    manifest = read_release_manifest(tmp_path / "merged")
    errors = manifest.merge["probe"]["relative_logit_error"]
    card = (tmp_path / "merged" / "README.md").read_text()
    assert f"logits on 1 prompt: the trained model in its own arithmetic {errors['live']:.1e}, " in card
    assert f"LoRA merged onto nf4-exact {errors['nf4-exact']:.1e}, LoRA merged onto bf16 {errors['bf16']:.1e}." in card
    assert manifest.merge["base"] == "nf4-exact"
    assert manifest.probe["difference_to_trained"] < 1e-3


@pytest.mark.parametrize("name", ["gemma3", "qwen3_moe"])
def test_releases_of_decoders_in_other_files(tiny_dataset, tiny_llm, tmp_path, name):
    """Trained, merged and verified from the files of a multimodal model, and of one whose experts stand alone there."""
    if name == "gemma3":
        write_wrapper(tmp_path / "llm", name, tiny_llm)
    else:
        write_any(tmp_path / "llm", name, tiny_llm)
    checkpoint = write_run(tmp_path / "run", tiny_dataset, tmp_path / "llm")
    for form in ("adapter", "merged"):
        out = tmp_path / form
        assert (
            main(["merge", str(checkpoint.parent.parent), "--out", str(out), "--format", form, "--dtype", "fp32"]) == 0
        )
        assert main(["release", "verify", str(out)]) == 0
        card = (out / "README.md").read_text()
        assert ("the text decoder inside a gemma3 model" in card) == (name == "gemma3")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "llm")
    assert llm.config.model_type == {"gemma3": "gemma3_text"}.get(name, name)
    assert read_release_manifest(tmp_path / "merged").probe["difference_to_trained"] < 1e-3


def rows_in(file) -> dict[tuple[str, str], float]:
    with file.open() as text:
        return {(row["clip"], row["au"]): float(row["probability"]) for row in csv.DictReader(text)}
