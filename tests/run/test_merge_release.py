"""`aullm-dist merge` writes release folders of both formats, and they are what was trained."""

import pytest
from release_samples import write_run

from aullm_dist.cli import main
from aullm_dist.model.tiny import build_tiny_backbone
from aullm_dist.release.layout import read_release_manifest

pytestmark = pytest.mark.launch


def test_release_folders_of_both_formats(tiny_dataset, tmp_path):
    llm = build_tiny_backbone(tmp_path / "llm", hidden=64, layers=2, heads=2)
    checkpoint = write_run(tmp_path / "run", tiny_dataset, llm, quantization="nf4")
    for form in ("adapter", "merged"):
        out = tmp_path / form
        options = ["--format", form, "--dtype", "fp32"]
        assert main(["merge", str(checkpoint.parent.parent), "--out", str(out), *options]) == 0
        assert main(["release", "verify", str(out)]) == 0
        assert not (tmp_path / f"{form}.partial").exists()
    manifest = read_release_manifest(tmp_path / "merged")
    assert manifest["merge"]["base"] == "nf4-exact"
    assert manifest["probe"]["difference_to_trained"] < 1e-3
