"""A trained model in memory: from a release folder, or straight from a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from aullm_dist.config import Config
from aullm_dist.errors import UserError
from aullm_dist.release.origin import Thresholds, choose_release_thresholds, find_home, find_preparation
from aullm_dist.training.build import build_model
from aullm_dist.training.checkpoint import read_checkpoint
from aullm_dist.training.predict import find_trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A trained model and what must be known to use it.

    The model takes gray clips `[V, T, H, W]` in 0..1 with T = `num_frames` and H = W = `size`:
    `model.explain(views).logits` is `[V, A]`, A in the order of `aus`.
    """

    path: Path
    """The release or checkpoint folder."""
    format: Literal["adapter", "merged", "checkpoint"]
    model: nn.Module
    """`AULLM`, or `LedCnnBaseline` of a checkpoint without an LLM; in evaluation mode, on `device`."""
    aus: tuple[int, ...]
    """AU numbers in the order of the logits."""
    thresholds: Thresholds
    num_frames: int
    """Frames per clip, T, sampled uniformly in time over onset..offset."""
    size: int
    """Height and width of the frames, in pixels."""
    crop: Mapping[str, Any] | None
    """How the training clips were cropped, as their preparation recorded it; None where that is not known."""
    corpora: tuple[str, ...]
    """Corpora that the model was trained on."""
    config: Config
    """The settings that the model was built from."""
    device: torch.device


def load(path: str | Path, *, device: str | torch.device | None = None, llm: str | None = None) -> Release:
    """Load a release folder, a checkpoint, or the newest valid checkpoint of a fold, in evaluation mode.

    Args:
        path: folder written by `aullm-dist merge`, a checkpoint, or a fold such as `runs/first/fold-00`.
        device: where the model goes; None takes the GPU if there is one.
        llm: folder or Hugging Face name of the base LLM, where it is no longer found at its recorded place. A merged
            release holds its own.

    Raises:
        UserError: there is no such folder, a file of it is missing or altered, or the LLM is not the one that the
            adapter was trained on.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; allowed: a release, a checkpoint or a fold of a run")
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    return _load_checkpoint(folder, target, llm)


def _load_checkpoint(path: Path, device: torch.device, llm: str | None) -> Release:
    trained = find_trained(path, [f"model.llm={llm}"] if llm is not None else [], processes=1)
    config = trained.config
    with torch.random.fork_rng(devices=[]):
        built = build_model(config, trained.aus, config.model.llm)
    saved = read_checkpoint(
        trained.folder, built.model, with_optimizer=False, model_config=built.model_config, base=built.base
    )
    saved.apply()
    home = find_home(trained.folder)
    preparation = find_preparation(config, home)
    return Release(
        path=trained.folder,
        format="checkpoint",
        model=built.model.to(device).eval(),
        aus=trained.aus,
        thresholds=choose_release_thresholds(trained.folder, trained.aus, home),
        num_frames=config.data.num_frames,
        size=config.data.size,
        crop=preparation.crop,
        corpora=preparation.corpora,
        config=config,
        device=device,
    )
