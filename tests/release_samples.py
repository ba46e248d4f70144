"""A run folder as training leaves it, with random weights in place of trained ones: seconds instead of a training."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from prediction_samples import rows_of

from aullm_dist.checkpoint.store import RunFacts, save_checkpoint
from aullm_dist.config import Config, from_dict, to_dict
from aullm_dist.data.clips import read_samples
from aullm_dist.data.corpora import CORPORA
from aullm_dist.data.protocols import FoldPlan, make_folds, write_folds
from aullm_dist.release.export import CardOptions, export
from aullm_dist.runs.paths import FoldPaths
from aullm_dist.runs.predictions import write_predictions
from aullm_dist.training.build import build_model

AUS = CORPORA["casme2"].aus
STEP = 10


@pytest.fixture(scope="module")
def llm(tiny_llm, tmp_path_factory) -> Path:
    """A backbone of this module's own, because tests move it away."""
    return Path(shutil.copytree(tiny_llm, tmp_path_factory.mktemp("base") / "llama"))


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset, llm, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("released") / "run", tiny_dataset, llm)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("adapter") / "release"
    export(checkpoint, out, format="adapter", card=CardOptions(authors=["A. Author"]))
    return out


def release_config(dataset: Path, llm: Path | str, **model: object) -> Config:
    """Return the configuration of the run; `model` are more settings of its group."""
    settings = {"llm": str(llm), "lora_rank": 4, "graph_width": 16, "graph_heads": 2, **model}
    data = {"train": [str(dataset)], "protocol": "grouped", "folds": 3, "inner_fraction": 0.3}
    return from_dict({"model": settings, "data": data, "training": {"global_batch": 4, "micro_batch": 4}}, "sample")


def write_run(run: Path, dataset: Path, llm: Path | str, **model: object) -> Path:
    """Write folds, predictions of all folds, and a checkpoint of fold 0; return the checkpoint."""
    config = release_config(dataset, llm, **model)
    samples = read_samples([dataset])
    folds = make_folds(samples, "grouped", inner_fraction=0.3, num_folds=3)
    write_folds(run / "folds.json", FoldPlan("grouped", ("casme2",), AUS, 0, folds))
    truth = {sample.sample_id: tuple(int(au in sample.aus) for au in AUS) for sample in samples}
    generator = np.random.default_rng(0)
    for fold in folds:
        rows = rows_of(fold, truth, generator, gain=2.0, offset=-1.5)
        write_predictions(FoldPaths(run, fold.index).predictions(2), rows, aus=AUS, epoch=2, step=STEP)
    return _write_checkpoint(run / "fold-00" / "checkpoints", config, llm)


def _write_checkpoint(folder: Path, config: Config, llm: Path | str) -> Path:
    built = build_model(config, AUS, llm)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in built.model.named_parameters():
            # LoRA begins as nothing, which would hide one that got lost.
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return save_checkpoint(
        folder,
        STEP,
        model=built.model,
        optimizer=None,
        state={"epoch": 2},
        run=RunFacts(
            config=to_dict(config),
            model_config=built.model_config,
            base=built.base,
            quantized_modules=built.quantized_modules,
        ),
    )
