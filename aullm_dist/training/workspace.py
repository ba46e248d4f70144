"""What a run stands on before it trains: the run folder, its datasets and its backbone."""

import hashlib
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from aullm_dist.config import Config, ModelConfig, from_dict, to_dict
from aullm_dist.data.protocols import FoldPlan, read_folds, write_folds
from aullm_dist.errors import UserError
from aullm_dist.files import write_text
from aullm_dist.log import get_logger
from aullm_dist.training.lock import refuse_running
from aullm_dist.training.manifest import library_versions

logger = get_logger(__name__)

Mode = Literal["new", "resume", "replace", "again"]
CONFIG_FILE = "config.yaml"
FOLDS_FILE = "folds.json"
ENVIRONMENT_FILE = "environment.json"
DEEPSPEED_FILE = "deepspeed.json"
_MAY_CHANGE = {
    "model.architecture",  # describes model.llm, and must agree with what is loaded
    "training.output",
    "training.processes",
    "training.strategy",
    "training.micro_batch",
    "training.cpu_threads",
    "training.check_memory",
    "training.keep_checkpoints",
    "training.save_every_steps",
    "training.verify",
    "training.grace_seconds",
    "training.max_failures",
    "data.workers",
    "data.crops",  # resolved from the datasets, which must not change
    "data.fold",
    "monitor.tensorboard",
    "monitor.log_every_steps",
    "monitor.communication_every_steps",
    "monitor.images",
    "monitor.clips",
    "monitor.projector_clips",
}


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
    saved = run / CONFIG_FILE
    if mode == "new" and (saved.exists() or any(run.glob("fold-*"))):
        raise UserError(
            f"{run} holds a run already; add --resume auto to continue it, --replace to train it anew, or choose "
            "another folder with training.output="
        )
    if mode in ("resume", "again") and saved.exists():
        _refuse_other_config(saved, config, mode)
    # All folds are replaced, so nobody may train any of them; a job of one fold goes beside those of others.
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
    folds, environment_file = run / FOLDS_FILE, run / ENVIRONMENT_FILE
    if mode == "resume" and folds.exists() and environment_file.exists():
        before = json.loads(environment_file.read_text(encoding="utf-8")).get("data_sha256")
        if read_folds(folds) != plan or before != data_fingerprint:
            raise UserError(
                f"{run}: the data changed since the run began (clips, labels, frames or preparation); prepare them as "
                "they were or choose another folder with training.output="
            )
    if mode in ("replace", "again"):
        if (run / CONFIG_FILE).exists():
            logger.info("Replacing the earlier run in %s", run)
        remove_results(run)
    run.mkdir(parents=True, exist_ok=True)
    write_folds(folds, plan)
    write_text(environment_file, json.dumps({**environment(), "data_sha256": data_fingerprint}, indent=2) + "\n")
    if deepspeed is None:
        (run / DEEPSPEED_FILE).unlink(missing_ok=True)
    else:
        write_text(run / DEEPSPEED_FILE, json.dumps(deepspeed, indent=2) + "\n")
    write_text(run / CONFIG_FILE, yaml.safe_dump(to_dict(config), sort_keys=False))


def remove_results(run: Path) -> None:
    """Remove what training and evaluation wrote below `run`; corpus, dataset and backbone stay."""
    for path in [*run.glob("fold-*"), run / "tensorboard", run / "baseline"]:
        if path.is_dir():
            shutil.rmtree(path)
    for pattern in (
        CONFIG_FILE,
        FOLDS_FILE,
        DEEPSPEED_FILE,
        "stratification.json",
        "metrics*.json",
        "table*.md",
        "table*.csv",
    ):
        for path in run.glob(pattern):
            path.unlink()


def _refuse_other_config(saved: Path, config: Config, mode: Mode) -> None:
    content = yaml.safe_load(saved.read_text(encoding="utf-8"))
    before, now = to_dict(from_dict(content, str(saved))), to_dict(config)
    remedy = "resume with the same configuration" if mode == "resume" else "add --replace to train anew"
    differences = [
        f"{group}.{key} = {before[group][key]!r}, now it is {value!r}"
        for group, values in now.items()
        for key, value in values.items()
        if f"{group}.{key}" not in _MAY_CHANGE and before[group][key] != value
    ]
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
    from aullm_dist.data.prepare import prepare
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
    base = Path(config.training.output)
    corpus, prepared = base / "corpus" / name, base / "dataset" / f"{name}-{data.size}px"
    if not (prepared / "dataset_info.json").is_file():
        logger.info("Synthetic corpus: writing %s", corpus)
        write_corpus(spec, corpus)
        # One process: a worker would import the main module of the run anew.
        prepare(data.synthetic_corpus, corpus, prepared, size=data.size, num_workers=1)
        logger.info("Prepared dataset: %s", prepared)
    else:
        logger.info("Synthetic corpus: %s, prepared in %s (kept from an earlier run)", corpus, prepared)
    return prepared


def backbone_of(config: Config) -> str:
    """Return the path or name of the backbone, building the tiny one below the run folder if it is asked for."""
    model = config.model
    if model.llm != "tiny":
        for key in ("llm_architecture", "llm_hidden", "llm_layers"):
            if model.llm != "none" and getattr(model, key) != getattr(ModelConfig(), key):
                logger.warning("model.%s is ignored: it describes the tiny backbone, not %s", key, model.llm)
        return model.llm
    from aullm_dist.model.tiny import build_tiny_backbone

    folder = Path(config.training.output) / "backbone"
    build_tiny_backbone(
        folder, architecture=model.llm_architecture, hidden=model.llm_hidden, layers=model.llm_layers, heads=4, seed=0
    )
    return str(folder)
