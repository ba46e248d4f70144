"""Computes answers of a trained checkpoint, with the LLM whole in each process or partitioned as in training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from torch import nn

from aullm_dist.checkpoint.manifest import MANIFEST_NAME, read_manifest
from aullm_dist.checkpoint.retention import find_checkpoint
from aullm_dist.checkpoint.store import MODULES_CONFIG_FILE, read_checkpoint
from aullm_dist.config import Config, checked, from_dict, may_differ, with_overrides
from aullm_dist.data.clips import ClipView
from aullm_dist.data.inputs import InputClips
from aullm_dist.distributed import engine
from aullm_dist.distributed.context import on_main, together
from aullm_dist.distributed.placement import placement_of
from aullm_dist.errors import UserError
from aullm_dist.evaluation.answers import Answers
from aullm_dist.files import read_json
from aullm_dist.log import get_logger
from aullm_dist.model.assembly import BuiltModel
from aullm_dist.runs.recorded import find_base
from aullm_dist.training.batches import ClipRecipe
from aullm_dist.training.build import build_model
from aullm_dist.training.heldout import HeldOut
from aullm_dist.training.run import check_packing, refuse_compiled

logger = get_logger(__name__)

CHANGEABLE = may_differ("prediction")
"""Settings that say where and how an answer is computed; all others say which, and are the checkpoint's."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A checkpoint to answer with: its folder, the configuration to compute with, and the AUs of its answers."""

    folder: Path
    config: Config
    aus: tuple[int, ...]


def find_trained(path: Path, overrides: Sequence[str], processes: int) -> Trained:
    """Return the checkpoint that is meant by `path`, with its own configuration but for `overrides`.

    Args:
        path: a checkpoint, or a fold or a folder of checkpoints, of which the newest valid one is taken.
        overrides: `section.key=value` of keys in `CHANGEABLE`.
        processes: of this run. A single one computes with `ddp`, that is whole, unless `overrides` say otherwise.

    Raises:
        UserError: there is no checkpoint, or an override would make the answers another model's.
    """
    folder = find_checkpoint(path, logger)
    manifest = read_manifest(folder)
    config = from_dict(manifest.config, f"{folder / MANIFEST_NAME}: config")
    keys = [override.partition("=")[0].strip() for override in overrides]
    for override, key in zip(overrides, keys, strict=True):
        if key not in CHANGEABLE:
            raise UserError(
                f"override {override!r}: a prediction takes it from the checkpoint; allowed: {', '.join(CHANGEABLE)}"
            )
    # Compiling takes longer than most predictions, and ZeRO-3 does not go with it.
    config = config.changed({"model.compile": "none", "training.processes": None, "training.folds_at_once": 1})
    if manifest.base is not None and config.model.llm != "none" and "model.llm" not in keys:
        config = config.changed({"model.llm": find_base(manifest.base, manifest.config, folder)})
    if processes == 1:
        config = config.changed({"training.strategy": "ddp"})
    config = with_overrides(config, overrides)
    # There are no steps: a global batch is what one pass of all processes answers.
    config = config.changed({"training.global_batch": max(config.training.micro_batch, 1) * processes})
    config = checked(config, f"{folder} with overrides" if overrides else str(folder))
    aus = read_json(folder / MODULES_CONFIG_FILE, keys=("aus",))["aus"]
    return Trained(folder, config, tuple(aus))


def load_trained(accelerator: Accelerator, trained: Trained) -> tuple[BuiltModel, nn.Module]:
    """Build the model of a checkpoint, divide it as its engine does, and give it what the checkpoint holds.

    Args:
        accelerator: from `context.start` with the configuration of `trained`.
        trained: from `find_trained`.

    Returns:
        The model, and the same as its engine wraps it, for `answer_clips` and `engine.release`.

    Raises:
        UserError: the checkpoint or its LLM cannot be used, or do not belong together.
    """
    config = trained.config
    refuse_compiled(config)
    sharding = engine.resolved(config.training, accelerator.num_processes)
    built = build_model(config, trained.aus, config.model.llm, placement_of(accelerator, sharding))
    built.model.to(accelerator.device)
    served = engine.serve(accelerator, built.model)
    saved = together(
        accelerator,
        lambda: read_checkpoint(
            trained.folder, built.model, with_optimizer=False, model_config=built.model_config, base=built.base
        ),
    )
    saved.apply()
    built.model.eval()
    logger.info("Checkpoint: %s, step %d", trained.folder, saved.trainer["step"])
    together(accelerator, lambda: check_packing(config, built))
    return built, served


def answer_clips(
    accelerator: Accelerator,
    model: nn.Module,
    recipe: ClipRecipe,
    aus: Sequence[int],
    clips: ClipView | InputClips,
    micro_batch: int,
) -> Answers:
    """Answer every clip; each process computes its share, all return all answers.

    Args:
        accelerator: of the run.
        model: with its weights in place, plain or as the engine wraps it.
        recipe: how clips become tensors.
        aus: AU numbers of the answers.
        clips: the same on every process; a process asks for its share, and for the first.
        micro_batch: clips per forward pass.

    Raises:
        UserError: an answer is not finite.
    """
    answers = HeldOut(accelerator, recipe, aus, micro_batch).answer(model, clips, name="Predicting")[None]
    on_main(accelerator, lambda: _refuse_not_finite(answers))
    return answers


def _refuse_not_finite(answers: Answers) -> None:
    for sample_id, finite in zip(answers.sample_ids, np.isfinite(answers.logits).all(axis=1), strict=True):
        if not finite:
            raise UserError(f"logits of {sample_id} are not finite; the training has diverged, or the LLM is damaged")
