"""Shared by all tests: helper modules beside this file are importable, and processes keep to one thread."""

import os
import shutil
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not shutil.which("nvidia-smi"):
    # Read when triton is imported, by whichever test comes first: without a GPU its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """A prepared synthetic corpus in CASME II's layout: 6 subjects with 4 short clips each, 64 pixels."""
    from aullm_dist.data.prepare import prepare
    from aullm_dist.data.synthetic import SyntheticSpec, write_corpus

    folder = tmp_path_factory.mktemp("tiny")
    spec = SyntheticSpec(
        corpus="casme2", subjects=6, clips_per_subject=4, balance=1.0, num_frames=(8, 12), frame_size=(64, 64)
    )
    write_corpus(spec, folder / "corpus")
    prepare("casme2", folder / "corpus", folder / "dataset", size=64, num_workers=1)
    return folder / "dataset"


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> Path:
    """A two-layer Llama of width 32 with its tokenizer."""
    from aullm_dist.model.tiny import build_tiny_backbone

    return build_tiny_backbone(tmp_path_factory.mktemp("llm") / "llama", hidden=32, layers=2, heads=2)
