"""What a run stands on before it trains: the run folder, its datasets and its backbone."""

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import yaml

from aullm_dist.config import Config, from_dict, to_dict
from aullm_dist.errors import UserError
from aullm_dist.files import write_text
from aullm_dist.log import get_logger

logger = get_logger(__name__)

Mode = Literal["new", "resume", "replace"]
CONFIG_FILE = "config.yaml"
_LIBRARIES = ("torch", "accelerate", "transformers", "peft", "datasets", "numpy", "safetensors")
_MAY_CHANGE = {
    "training.output",
    "training.processes",
    "training.micro_batch",
    "training.cpu_threads",
    "training.keep_checkpoints",
    "training.save_every_steps",
    "data.workers",
    "data.fold",
    "monitor.tensorboard",
    "monitor.log_every_steps",
}


def open_run(config: Config, mode: Mode) -> Path:
    """Make the run folder ready and write the resolved configuration and the environment into it.

    Args:
        config: the run's configuration; `training.output` names the folder.
        mode: `new` wants a folder without a run, `resume` continues the run in it if there is one, `replace` removes
            what an earlier run trained there and keeps its corpus and backbone.

    Raises:
        UserError: the folder holds a run and `new` was asked for, or the run in it has another configuration.
    """
    run = Path(config.training.output)
    saved = run / CONFIG_FILE
    if run.exists() and not run.is_dir():
        raise UserError(f"training.output: {run} is a file; give a folder")
    if saved.exists():
        if mode == "new":
            raise UserError(
                f"{run} holds a run already; add --resume auto to continue it, --replace to train it anew, or choose "
                "another folder with training.output="
            )
        if mode == "resume":
            _refuse_other_config(saved, config)
        else:
            logger.info("Replacing the earlier run in %s", run)
            remove_results(run)
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_text(saved, yaml.safe_dump(to_dict(config), sort_keys=False))
        write_text(run / "environment.json", json.dumps(environment(), indent=2) + "\n")
    except OSError as error:
        raise UserError(
            f"training.output: {run} cannot be written ({error.strerror}); give a writable folder"
        ) from error
    return run


def remove_results(run: Path) -> None:
    """Remove what training wrote below `run`, and nothing else."""
    for path in [*run.glob("fold-*"), run / "tensorboard", run / "baseline"]:
        if path.is_dir():
            shutil.rmtree(path)
    for name in ("folds.json", "metrics.json", "table.md", "table.csv"):
        (run / name).unlink(missing_ok=True)


def _refuse_other_config(saved: Path, config: Config) -> None:
    content = yaml.safe_load(saved.read_text(encoding="utf-8"))
    before, now = to_dict(from_dict(content, str(saved))), to_dict(config)
    for group, values in now.items():
        for key, value in values.items():
            name = f"{group}.{key}"
            if name not in _MAY_CHANGE and before[group][key] != value:
                raise UserError(
                    f"{saved.parent} holds a run with {name} = {before[group][key]!r}, now it is {value!r}; resume "
                    "with the same configuration or choose another folder with training.output="
                )


def environment() -> dict[str, Any]:
    """Return versions, machine and commit, for the run's records."""
    versions = {}
    for name in _LIBRARIES:
        versions[name] = importlib.metadata.version(name)
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Return the commit of the checkout that this package runs from; None for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    result = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


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
    name = f"{data.synthetic_corpus}-{data.synthetic_subjects}x{data.synthetic_clips}"
    name += f"-amplitude{data.synthetic_amplitude:g}-balance{data.synthetic_balance:g}"
    name += f"-shift_{data.synthetic_shift}-seed{data.synthetic_seed}"
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
        return model.llm
    from aullm_dist.model.tiny import build_tiny_backbone

    folder = Path(config.training.output) / "backbone"
    build_tiny_backbone(
        folder, architecture=model.llm_architecture, hidden=model.llm_hidden, layers=model.llm_layers, heads=4, seed=0
    )
    return str(folder)
