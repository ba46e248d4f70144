"""Loads a trained model from a release folder, or straight from a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from aullm_dist.checkpoint.compatibility import ExpectedModel, StoredModel, refuse_other_model
from aullm_dist.checkpoint.entries import TensorTable
from aullm_dist.checkpoint.store import SavedState, read_checkpoint
from aullm_dist.checkpoint.tensor_plan import ADAPTER_FILE, MODULES_FILE, plan_tensors
from aullm_dist.config import Config, from_dict
from aullm_dist.errors import UserError
from aullm_dist.evaluation.caveats import model_caveats
from aullm_dist.files import read_json, user_path
from aullm_dist.llm.identity import BaseIdentity
from aullm_dist.model.assembly import BuiltModel
from aullm_dist.model.networks import stream_of
from aullm_dist.release.describe import prompt_facts
from aullm_dist.release.layout import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    LLM_FOLDER,
    RELEASE_FILE,
    check_files,
    is_release,
    read_release_manifest,
)
from aullm_dist.release.origin import Origin, Thresholds, find_marks, find_origin
from aullm_dist.release.predicting import Prediction, predict, views_of
from aullm_dist.runtime.gpu import compute_float32_exactly
from aullm_dist.training.build import build_model

ReleaseFormat = Literal["adapter", "merged", "checkpoint", "served"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A trained model and what must be known to use it.

    Of gray clips `[V, T, H, W]` in 0..1 with T = `num_frames` and H = W = `size`, `model.explain(views(clips)).logits`
    is `[V, A]`, A in the order of `aus`.
    """

    path: Path
    """The release or checkpoint folder."""
    format: ReleaseFormat
    model: nn.Module
    """`AULLM`, or `NetworkAlone` of a checkpoint without an LLM; in evaluation mode, on `device`."""
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
    caveats: tuple[str, ...]
    """What a reader must know before any answer: drawn faces, an LLM of random weights; sentences without full stop."""
    config: Config
    """The settings of its run, with the LLM where it is. A merged release has the LoRA of these in its LLM."""
    device: torch.device

    def views(self, clips: Tensor) -> Tensor:
        """Return what the model is given of gray clips `[V, T, H, W]` in 0..1: `[V, C, H, W]` float32, on `device`."""
        return views_of(clips.float().cpu().numpy(), stream_of(self.model)).to(self.device)

    def predict(self, frames: np.ndarray | Sequence[np.ndarray], **options: Any) -> Prediction:
        """Answer one clip of frames in memory; arguments, shapes and errors as in `predicting.predict`."""
        return predict(self, frames, **options)


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    llm: str | None = None,
    trust_remote_code: bool = False,
) -> Release:
    """Load a release folder, a checkpoint, or the newest valid checkpoint of a fold, in evaluation mode.

    Args:
        path: folder written by `aullm-dist merge`, a checkpoint, or a fold such as `runs/first/fold-00`.
        device: where the model goes; None takes the GPU if there is one.
        llm: folder or Hugging Face name of the base LLM, where it is no longer found at its recorded place. A merged
            release holds its own.
        trust_remote_code: run model code that ships with the base LLM of a release; a release cannot ask for it. A
            checkpoint does what its run was set to do.

    Raises:
        UserError: there is no such folder, a file of it is missing or altered, or the LLM is not the one that the
            adapter was trained on.
    """
    folder = user_path(path)
    target = pick_device(device)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; allowed: a release, a checkpoint or a fold of a run")
    if is_release(folder):
        manifest = read_release_manifest(folder)
        check_files(folder, manifest, every_byte=False)
        return load_unchecked(folder, target, manifest.tensors, llm=llm, trust_remote_code=trust_remote_code)
    if (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder}: {RELEASE_FILE} is missing; allowed: a folder that aullm-dist merge wrote, whole")
    return load_origin(find_origin(folder, llm), target)


def load_unchecked(
    folder: Path,
    device: torch.device,
    tensors: Mapping[str, TensorTable],
    *,
    llm: str | None = None,
    trust_remote_code: bool = False,
) -> Release:
    """Load a release folder whose files are known to be right, as `load` does.

    Args:
        folder: the release.
        device: where the model goes.
        tensors: `tensor_table` of its files by name.
        llm: see `load`.
        trust_remote_code: see `load`.
    """
    described = read_json(folder / CONFIG_FILE)
    config = _settings(folder, described, llm, trust_remote_code)
    # LoRA that was merged is in the LLM. No run may be set so: it trains LoRA.
    rank = config.model.lora_rank if described["format"] == "adapter" else 0
    built = _build(config.changed({"model.lora_rank": rank}), tuple(described["aus"]), device)
    files = {ADAPTER_FILE: f"{ADAPTER_FOLDER}/{ADAPTER_FILE}", MODULES_FILE: MODULES_FILE}
    plan = plan_tensors(built.model)
    refuse_other_model(
        folder,
        StoredModel(
            tensors={name: tensors.get(path, {}) for name, path in files.items()},
            config=described["function"],
            base=BaseIdentity.from_json(described["base"]),
        ),
        ExpectedModel(
            plan=plan,
            config=built.model_config,
            base=built.base if described["format"] == "adapter" else None,
        ),
        with_optimizer=False,
        what="release",
    )
    _refuse_other_tokens(folder, described["prompt"], built)
    values = {name: load_file(folder / path) for name, path in files.items() if path in tensors}
    SavedState({}, plan, {item.name: values[item.file][item.key] for item in plan}, {}).apply()
    return release_of(folder, described, built.model.to(device), config, described["format"], device)


def release_of(
    folder: Path,
    described: Mapping[str, Any],
    model: nn.Module,
    config: Config,
    format: ReleaseFormat,
    device: torch.device,
) -> Release:
    """Return a loaded release with what its config.json says of it.

    Args:
        folder: where it is.
        described: its config.json.
        model: its model, with the release's values.
        config: see `Release`.
        format: see `Release`.
        device: of the model.
    """
    preprocessing = described["preprocessing"]
    return Release(
        path=folder,
        format=format,
        model=model.eval(),
        aus=tuple(described["aus"]),
        thresholds=Thresholds(
            values={au: described["thresholds"][f"AU{au}"] for au in described["aus"]},
            policy=described["threshold_policy"],
        ),
        num_frames=preprocessing["num_frames"],
        size=preprocessing["size"],
        crop=preprocessing["crop"],
        corpora=tuple(described["corpora"]),
        caveats=recorded_caveats(described),
        config=config,
        device=device,
    )


def recorded_caveats(described: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a release's config.json says of its answers; older releases say nothing."""
    return model_caveats(described.get("caveats", ()))


def _refuse_other_tokens(folder: Path, recorded: Mapping[str, Any], built: BuiltModel) -> None:
    """A tokenizer that was changed on the Hub would alter every answer silently."""
    network: Any = built.model
    found = prompt_facts(network.reasoner.prompt)
    if found != recorded:
        key = next(key for key in recorded if found[key] != recorded[key])
        raise UserError(f"{folder}: the LLM's tokenizer gives other {key} than it did in training; use that tokenizer")


def _settings(folder: Path, described: Mapping[str, Any], llm: str | None, trust_remote_code: bool) -> Config:
    """Return the settings that the release's model is built from, with the LLM in its place."""
    config = from_dict(described["settings"], f"{folder / CONFIG_FILE}: settings")
    config = config.changed({"model.trust_remote_code": trust_remote_code})
    if described["format"] == "merged":
        if llm is not None:
            raise UserError(f"{folder}: is a merged release, which holds its LLM; leave out the LLM {llm}")
        return config.changed({"model.llm": str(folder / LLM_FOLDER)})
    name = described["base"]["name"]
    # The name of a folder may look like one of the Hub's.
    was_folder = described["base"]["revision"] is None and described["base"]["files"]
    if llm is None and was_folder and not Path(name).exists():
        raise UserError(f"{folder}: its base LLM is not at {name}; say where it is with --llm, or load(..., llm=...)")
    return config.changed({"model.llm": name if llm is None else llm})


def _build(config: Config, aus: tuple[int, ...], device: torch.device) -> BuiltModel:
    """Build a model and leave torch's generator as it was."""
    with torch.random.fork_rng(devices=[]):
        return build_model(config, aus, config.model.llm, device=device)


def load_origin(origin: Origin, device: torch.device) -> Release:
    """Load a checkpoint as `load` does.

    Raises:
        UserError: a file is missing or altered, or the LLM is not the one that the adapter was trained on.
    """
    config = origin.config
    built = _build(config, origin.aus, device)
    saved = read_checkpoint(
        origin.folder, built.model, with_optimizer=False, model_config=built.model_config, base=built.base
    )
    saved.apply()
    return Release(
        path=origin.folder,
        format="checkpoint",
        model=built.model.to(device).eval(),
        aus=origin.aus,
        thresholds=origin.thresholds,
        num_frames=config.data.num_frames,
        size=config.data.size,
        crop=origin.preparation.crop,
        corpora=origin.preparation.corpora,
        caveats=model_caveats(find_marks(config, origin.preparation)),
        config=config,
        device=device,
    )


def pick_device(device: str | torch.device | None) -> torch.device:
    """Return the device that is meant, set to compute float32 as such; None is the GPU if there is one.

    Raises:
        UserError: there is no such device.
    """
    compute_float32_exactly()
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        # Asked for a tensor, because a name alone does not tell whether the device is there.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: is not there; allowed: cpu, or cuda on a machine with a GPU") from error
