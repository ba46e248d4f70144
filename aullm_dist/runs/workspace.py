"""Prepares what a run stands on before it trains: the run folder, its datasets and its backbone."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from aullm_dist.config import (
    BUILT,
    Config,
    ModelConfig,
    different_settings,
    load_recorded,
    may_differ,
    to_dict,
    to_record,
)
from aullm_dist.data.protocols import FoldPlan, read_folds, write_folds
from aullm_dist.data.tables import is_dataset
from aullm_dist.errors import UserError
from aullm_dist.files import read_json, write_text
from aullm_dist.log import get_logger
from aullm_dist.runs.lock import refuse_running
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runs.recorded import moved
from aullm_dist.versions import library_versions

logger = get_logger(__name__)

Mode = Literal["new", "resume", "replace", "again"]


def check_run_folder(config: Config, mode: Mode) -> Path:
    """Check that a run may go into `training.output`, without touching it.

    Args:
        config: the run's configuration; `training.output` names the folder.
        mode: `new` wants a folder without a run, `resume` continues the run in it if there is one, `replace` will
            remove what an earlier run trained there, `again` does so only for a run of this very configuration.

    Raises:
        UserError: the folder holds a run and `new` was asked for, the run in it has another configuration, or another
            process trains in it.
    """
    run = Path(config.training.output)
    if run.exists() and not run.is_dir():
        raise UserError(f"training.output: {run} is a file; give a folder")
    saved = RunPaths(run).config
    if mode == "new" and (saved.exists() or RunPaths(run).folds()):
        raise UserError(
            f"{run} holds a run already; add --resume auto to continue it, --replace to train it again, or choose "
            "another folder with training.output="
        )
    if mode in ("resume", "again") and saved.exists():
        _refuse_other_config(saved, config, mode)
    # All folds are replaced, so nobody may train any of them; a job of one fold may run with those of others.
    refuse_running(run, config.data.fold if mode == "resume" else None)
    return run


def open_run(
    run: Path,
    config: Config,
    mode: Mode,
    plan: FoldPlan,
    data_fingerprint: str,
    deepspeed: Mapping[str, Any] | None = None,
) -> None:
    """Write what defines the run into its folder; called when data and model are known to be there.

    Args:
        run: the run folder.
        config: the run's configuration.
        mode: as in `check_run_folder`.
        plan: the folds.
        data_fingerprint: of all clips.
        deepspeed: the DeepSpeed configuration of the engine, None for DDP.

    Raises:
        UserError: a resumed run was trained on other data: other clips, labels or frames.
    """
    paths = RunPaths(run)
    folds, environment_file = paths.folds_file, paths.environment
    if mode == "resume" and folds.exists() and environment_file.exists():
        before = read_json(environment_file, "train again with --replace").get("data_sha256")
        if read_folds(folds) != plan or before != data_fingerprint:
            raise UserError(
                f"{run}: the data changed since the run began (clips, labels, frames or preparation); prepare them as "
                "they were or choose another folder with training.output="
            )
    if mode in ("replace", "again"):
        if paths.config.exists():
            logger.info("Replacing the earlier run in %s", run)
        remove_results(run)
    run.mkdir(parents=True, exist_ok=True)
    write_folds(folds, plan)
    write_text(environment_file, json.dumps({**environment(), "data_sha256": data_fingerprint}, indent=2) + "\n")
    if deepspeed is None:
        paths.deepspeed.unlink(missing_ok=True)
    else:
        write_text(paths.deepspeed, json.dumps(deepspeed, indent=2) + "\n")
    write_text(paths.config, yaml.safe_dump(to_record(config), sort_keys=False))


def remove_results(run: Path) -> None:
    """Remove what training and evaluation wrote below `run`; corpus, dataset and backbone stay."""
    for path in RunPaths(run).results():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _refuse_other_config(saved: Path, config: Config, mode: Mode) -> None:
    before, now = to_dict(load_recorded(saved)), to_dict(config)
    # Datasets that lie next to or below a run move with it; what is in them is compared when the run is opened.
    output, run = Path(before["training"]["output"]), Path(config.training.output).absolute()
    for side in ("train", "test"):
        places = [[folder, *map(str, moved(Path(folder), output, run))] for folder in before["data"][side]]
        for at, folder in enumerate(now["data"][side][: len(places)]):
            if os.path.abspath(folder) in places[at]:
                before["data"][side][at] = folder
    free = may_differ("resume")
    remedy = "resume with the same configuration" if mode == "resume" else "add --replace to train again"
    names = [name.split(".", 1) for name in different_settings(before, now) if name not in free]
    differences = [f"{group}.{key} = {before[group][key]!r}, now it is {now[group][key]!r}" for group, key in names]
    if differences:
        raise UserError(
            f"{saved.parent} holds a run with {'; '.join(differences)}; {remedy} or choose another folder with "
            "training.output="
        )


def environment() -> dict[str, Any]:
    """Return versions, machine and commit, for the run's records."""
    return {
        "command": sys.argv,
        "platform": platform.platform(),
        "versions": library_versions(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this package runs from; None for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def datasets_of(config: Config) -> tuple[list[Path], list[Path]]:
    """Return the prepared folders to train and to test on; the synthetic corpus is generated if none is named."""
    if config.data.train:
        return [Path(p) for p in config.data.train], [Path(p) for p in config.data.test]
    return [_synthetic_dataset(config)], []


def _synthetic_dataset(config: Config) -> Path:
    """Write the synthetic corpus in its corpus's own layout and read it back through the ordinary loader."""
    from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
    from aullm_dist.data.synthetic import SyntheticSpec, write_corpus

    data = config.data
    spec = SyntheticSpec(
        corpus=data.synthetic_corpus,
        subjects=data.synthetic_subjects,
        clips_per_subject=data.synthetic_clips,
        amplitude_percent=data.synthetic_amplitude,
        num_frames=(data.synthetic_frames, 2 * data.synthetic_frames) if data.synthetic_frames else None,
        balance=data.synthetic_balance,
        shift=data.synthetic_shift,
        seed=data.synthetic_seed,
    )
    # The hash keeps corpora of different descriptions apart, whatever the generator learns to vary.
    key = hashlib.sha256(repr(spec).encode()).hexdigest()[:8]
    name = f"{spec.corpus}-{spec.subjects}x{spec.clips_per_subject}-seed{spec.seed}-{key}"
    paths = RunPaths(Path(config.training.output))
    corpus, prepared = paths.corpora / name, paths.datasets / f"{name}-{data.size}px"
    if not is_dataset(prepared):
        logger.info("Synthetic corpus: writing %s", corpus)
        write_corpus(spec, corpus)
        # One process: a worker would import the main module of the run again.
        prepare(data.synthetic_corpus, corpus, prepared, PrepareOptions(size=data.size, num_workers=1))
        logger.info("Prepared dataset: %s", prepared)
    else:
        logger.info("Synthetic corpus: %s, prepared in %s (kept from an earlier run)", corpus, prepared)
    return prepared


def check_llm(config: Config) -> None:
    """Refuse an LLM that is no model folder and that no run writes; a name on the Hub is looked up when it is loaded.

    Raises:
        UserError: `model.llm` is a path, and there is none.
    """
    from aullm_dist.llm.files import resolve

    if config.model.llm not in (*BUILT, "none"):
        resolve(config.model.llm)


def backbone_of(config: Config) -> str:
    """Return the path or name of the backbone; `tiny` and `smollm2` are written below the run folder.

    Raises:
        UserError: what is asked for cannot be written.
    """
    model = config.model
    if model.llm != "tiny":
        for key in ("llm_architecture", "llm_hidden", "llm_layers"):
            if model.llm != "none" and getattr(model, key) != getattr(ModelConfig(), key):
                logger.warning("model.%s is ignored: it describes the tiny backbone, not %s", key, model.llm)
        if model.llm == "smollm2":
            return _smollm2(RunPaths(Path(config.training.output)).smollm2)
        return model.llm
    from aullm_dist.llm.tiny import build_tiny_backbone

    folder = RunPaths(Path(config.training.output)).backbone
    build_tiny_backbone(
        folder, architecture=model.llm_architecture, hidden=model.llm_hidden, layers=model.llm_layers, heads=4, seed=0
    )
    return str(folder)


def _smollm2(folder: Path) -> str:
    from aullm_dist.llm.stored.smollm2 import keep_or_fetch

    if not folder.exists():
        logger.info("Backbone: writing SmolLM2-135M-Instruct to %s", folder)
    return str(keep_or_fetch(folder))
