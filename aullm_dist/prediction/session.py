"""Opens a release or a checkpoint to answer many clips, in one process or in several."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from aullm_dist.config import Config, checked, may_differ, with_overrides
from aullm_dist.data.inputs import InputClips
from aullm_dist.distributed import context, engine
from aullm_dist.errors import UserError
from aullm_dist.evaluation.answers import Answers
from aullm_dist.evaluation.caveats import model_caveats
from aullm_dist.log import get_logger
from aullm_dist.release.layout import is_release
from aullm_dist.release.loading import load
from aullm_dist.release.origin import Thresholds, choose_release_thresholds, find_home, find_marks, find_preparation
from aullm_dist.release.predicting import crops_of
from aullm_dist.runtime.launch import check_launch
from aullm_dist.training.batches import ClipRecipe
from aullm_dist.training.build import evaluation_recipe
from aullm_dist.training.trained import answer_clips, find_trained, load_trained

logger = get_logger(__name__)

_SHOWN_AFTER_SECONDS = 3.0
CHANGEABLE_OF_RELEASES = may_differ("release")


@dataclass(frozen=True, slots=True, kw_only=True)
class InputOptions:
    """What the user asks about, as `InputClips` takes it."""

    inputs: Sequence[str]
    crop: str | None = None
    onset: int | None = None
    offset: int | None = None
    only: Sequence[str] = ()
    single: bool = False
    """Whether there must be one clip, as for a picture."""

    def open(self, config: Config, crops: Sequence[str]) -> InputClips:
        """Return the clips, of which folders and videos are not read yet."""
        clips = InputClips(
            self.inputs, size=config.data.size, trained=crops, crop=self.crop, onset=self.onset, offset=self.offset,
            only=self.only,
        )  # fmt: skip
        if self.single and len(clips) > 1:
            raise UserError(f"--figure shows one clip, and there are {len(clips)}; choose it with --clip ID")
        return clips


@dataclass(frozen=True, slots=True, kw_only=True)
class Answerer:
    """A model in its place and the clips that it is to answer."""

    accelerator: Accelerator
    model: nn.Module
    served: nn.Module
    """The same as its engine wraps it."""
    recipe: ClipRecipe
    path: Path
    aus: tuple[int, ...]
    thresholds: Thresholds
    config: Config
    crops: tuple[str, ...]
    """Identities of the crops that the model was trained on; none where they are not known."""
    caveats: tuple[str, ...]
    """What a reader must know before any answer, as sentences without a full stop."""
    clips: InputClips

    def asked(self, options: InputOptions) -> "Answerer":
        """Return the same model for other clips; folders and videos are not read yet.

        Raises:
            UserError: see `InputClips`.
        """
        return replace(self, clips=options.open(self.config, self.crops))

    def read(self) -> None:
        """Read this process's share of folders and videos, and the clip that makes up for one that is missing.

        Raises:
            UserError: on every process, what the first of them found.
        """
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        mine = [i for i in sorted({0, *range(rank, len(self.clips), processes)}) if not self.clips.labelled[i]]
        hidden = not self.accelerator.is_main_process
        bar = tqdm(mine, desc="Reading", unit="clip", disable=hidden, delay=_SHOWN_AFTER_SECONDS, leave=False)
        context.together(self.accelerator, lambda: self.clips.read(bar))

    def answer(self) -> Answers:
        """Answer every clip, together with the other processes.

        Raises:
            UserError: an answer is not finite.
        """
        micro_batch = self.config.training.micro_batch
        return answer_clips(self.accelerator, self.served, self.recipe, self.aus, self.clips, micro_batch)

    def close(self) -> None:
        """Release the model and the other processes."""
        engine.release(self.accelerator, self.served)
        context.stop(self.accelerator)


def open_answerer(path: Path, overrides: Sequence[str], options: InputOptions) -> Answerer:
    """Load a release folder, a checkpoint or a fold, for clips that were looked at before.

    Args:
        path: the folder.
        overrides: `section.key=value` that say where and how to compute.
        options: the clips.

    Raises:
        UserError: model, overrides or clips cannot be used, or do not belong together.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; allowed: a release, a checkpoint or a fold of a run")
    processes = check_launch()
    if is_release(path):
        return _of_release(path, overrides, options, processes)
    trained = find_trained(path, overrides, processes)
    config = trained.config
    accelerator = context.start(config.training)
    home = find_home(trained.folder)
    preparation = context.together(accelerator, lambda: find_preparation(config, home))
    crops = context.together(accelerator, lambda: crops_of(config, preparation.crop))
    clips = context.together(accelerator, lambda: options.open(config, crops))
    built, served = load_trained(accelerator, trained)
    return Answerer(
        accelerator=accelerator,
        model=built.model,
        served=served,
        recipe=evaluation_recipe(config, built),
        path=trained.folder,
        aus=trained.aus,
        thresholds=choose_release_thresholds(trained.folder, trained.aus, home),
        config=config,
        crops=crops,
        caveats=model_caveats(find_marks(config, preparation)),
        clips=clips,
    )


def _of_release(path: Path, overrides: Sequence[str], options: InputOptions, processes: int) -> Answerer:
    """Every process loads the release whole."""
    settings = dict(_checked(override) for override in overrides)
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    release = load(path, device=device, llm=settings.pop("model.llm", None))
    config = release.config.changed({"training.strategy": "ddp", "training.folds_at_once": 1})
    config = with_overrides(config, [f"{key}={value}" for key, value in settings.items()])
    config = config.changed({"training.global_batch": max(config.training.micro_batch, 1) * processes})
    config = checked(config, f"{path} with overrides")
    accelerator = context.start(config.training)
    crops = crops_of(config, release.crop)
    clips = context.together(accelerator, lambda: options.open(config, crops))
    logger.info("Release: %s (%s)", path, release.format)
    return Answerer(
        accelerator=accelerator,
        model=release.model,
        served=engine.serve(accelerator, release.model),
        recipe=ClipRecipe(num_frames=release.num_frames, visual=release.config.model.visual),
        path=path,
        aus=release.aus,
        thresholds=release.thresholds,
        config=config,
        crops=crops,
        caveats=release.caveats,
        clips=clips,
    )


def _checked(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    if key.strip() not in CHANGEABLE_OF_RELEASES:
        raise UserError(f"override {override!r}: a release brings it; allowed: {', '.join(CHANGEABLE_OF_RELEASES)}")
    return key.strip(), value
