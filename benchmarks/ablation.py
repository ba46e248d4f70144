"""Every arm of the ablation on small synthetic corpora: train, compare with the full model, print the tables.

    python benchmarks/ablation.py --out DIR [--seeds 0 1 2] [--arms NAME ...] [--pairs casme2:samm ...]
        [--json FILE] [--markdown FILE]

Corpora in the layouts of CASME II, SAMM and 4DME are written and prepared twice: with the corpus's own cameras, to
train on, and under vignette, rolling bands and gain drift, to test on. Neither a training clip nor an intervention has
those. Every seed has corpora, first weights and draws of its own. The arms are the shipped run files `ablation/*`, with
a tiny random LLM, on one group of held-out subjects of CASME II's layout (`within`) and across pairs of corpora. One
process, one thread; a finished run is not trained again, a broken off one goes on, so the command may be stopped and
repeated. Nothing here may be changed by looking at its tables.
"""

import argparse
import json
import os
import sys
import time
from datetime import UTC, datetime
from itertools import permutations
from pathlib import Path

from accelerate import Accelerator
from common import commit, cores, cpu_name, versions, write_json

from aullm_dist import log
from aullm_dist.config import Config, find_config, load, shipped_names
from aullm_dist.data.clips import read_samples
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.data.protocols import FoldPlan, au_vocabulary, make_folds, write_folds
from aullm_dist.data.synthetic import SyntheticSpec, write_corpus
from aullm_dist.distributed import context
from aullm_dist.errors import UserError
from aullm_dist.evaluation.blocks import render_blocks
from aullm_dist.files import write_text
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.report.ablation import ablation, problem_of
from aullm_dist.report.ablation_table import ablation_blocks
from aullm_dist.runs.lifecycle import Life
from aullm_dist.runtime.signals import StopSignals
from aullm_dist.training.run import run

CORPORA = ("casme2", "samm", "4dme")
GROUPED = CORPORA[0]
SEEN, HELD_OUT = "corpus", "vignette_banding"
ARMS = (
    "full",
    *(name for name in (path.removeprefix("ablation/") for path in shipped_names("ablation")) if name != "full"),
)
SIZE, FRAMES, GROUPS = 64, (12, 24), 4
COST = "cost.json"
EPOCHS = 20
PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy")


def main() -> int:
    """Train what is not trained yet, and print the tables of what there is."""
    options = parse_arguments()
    # The log of hundreds of runs says nothing that their folders do not.
    log.set_up(30)
    llm = options.out / "llm"
    if not (llm / "config.json").is_file():
        build_tiny_backbone(llm, hidden=64, layers=2, heads=4)
    sides = [("grouped", GROUPED, GROUPED), *(("cross", *pair) for pair in options.pairs)]
    wanted = [(seed, side, arm) for seed in options.seeds for side in sides for arm in options.arms]
    accelerator, signals, folders = None, StopSignals(), []
    for number, (seed, side, arm) in enumerate(wanted, start=1):
        config = configuration(options, datasets_of(options, side, seed), llm, arm, seed, side)
        folder = Path(config.training.output)
        folders.append(folder)
        if problem_of(folder) is None and (folder / COST).is_file():
            continue
        accelerator = accelerator or context.start(config.training)
        train(accelerator, config, signals)
        cost = json.loads((folder / COST).read_text())["cpu_seconds"]
        print(f"{number}/{len(wanted)} {folder.relative_to(options.out)}: {cost:.1f} s of CPU", flush=True)
    try:
        report(options, folders)
    except UserError as error:
        # Of one arm alone there is nothing to compare; the runs are there for the next call.
        sys.exit(f"benchmarks/ablation.py: error: {error}")
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="corpora and runs; used again if there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of training (0 1 2)")
    parser.add_argument("--generator", type=int, default=220, metavar="N", help="corpora of seed s: N + s (220)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="NAME", help="arms (all)")
    pairs = [*map(":".join, permutations(CORPORA, 2))]
    parser.add_argument(
        "--pairs",
        nargs="*",
        default=pairs[:1],
        choices=pairs,
        metavar="A:B",
        help=f"train on A, test on B ({pairs[0]})",
    )
    parser.add_argument("--subjects", type=int, default=20, metavar="N", help="subjects of each corpus (20)")
    parser.add_argument("--clips", type=int, default=12, metavar="N", help="clips of each subject (12)")
    parser.add_argument("--amplitude", type=float, default=2.0, metavar="PERCENT", help="peak movement (2)")
    parser.add_argument("--balance", type=float, default=1.0, metavar="0..1", help="1: AUs about equally frequent (1)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, metavar="N", help=f"of each training ({EPOCHS})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.pairs = [tuple(pair.split(":")) for pair in options.pairs]
    return options


def datasets_of(options: argparse.Namespace, side: tuple[str, str, str], seed: int) -> tuple[Path, Path | None]:
    """Return the training corpus of a test side and the corpus it is tested on, None within one; written once."""
    protocol, source, target = side
    train = write_dataset(options, source, SEEN, seed)
    return train, None if protocol == "grouped" else write_dataset(options, target, HELD_OUT, seed)


def write_dataset(options: argparse.Namespace, corpus: str, shift: str, seed: int) -> Path:
    """Write and prepare a corpus, if it is not there."""
    generator = options.generator + seed
    size = f"{options.subjects}x{options.clips}-{options.amplitude:g}-{options.balance:g}"
    name = f"{corpus}-{shift}-{size}-{generator}"
    prepared = options.out / "data" / name
    if not (prepared / "report.json").is_file():
        spec = SyntheticSpec(
            corpus=corpus, subjects=options.subjects, clips_per_subject=options.clips, shift=shift, seed=generator,
            amplitude_percent=options.amplitude, balance=options.balance, num_frames=FRAMES,
        )  # fmt: skip
        raw = write_corpus(spec, options.out / "raw" / name)
        prepare(corpus, raw, prepared, PrepareOptions(size=SIZE, num_workers=1))
    return prepared


def one_group(dataset: Path) -> Path:
    """Return a file with the first of `GROUPS` folds of held-out subjects; all of them would take as many trainings."""
    path = dataset / "one_group.json"
    if not path.is_file():
        samples = read_samples([dataset])
        folds = make_folds(samples, "grouped", num_folds=GROUPS, inner_fraction=0)
        write_folds(path, FoldPlan("grouped", (GROUPED,), au_vocabulary((GROUPED,), "grouped"), 0, folds[:1]))
    return path


def configuration(
    options: argparse.Namespace,
    datasets: tuple[Path, Path | None],
    llm: Path,
    arm: str,
    seed: int,
    side: tuple[str, str, str],
) -> Config:
    """Return an arm's run file with the data of a test side (protocol, training corpus, test corpus)."""
    protocol, source, target = side
    place = f"within-{source}" if protocol == "grouped" else f"{source}-to-{target}"
    train, test = datasets
    settings = {
        "data.train": json.dumps([str(train)]),
        "data.test": json.dumps([] if test is None else [str(test)]),
        "data.protocol": protocol,
        "data.folds_file": one_group(train) if test is None else "null",
        "data.size": SIZE,
        "data.workers": 0,
        # Thresholds are 0.5 here, so nobody needs to be held out to choose them.
        "data.inner_fraction": 0,
        "model.lora_rank": 8,
        "model.lora_alpha": 16,
        "model.lora_dropout": 0,
        "training.output": options.out / "runs" / place / f"seed-{seed}" / arm,
        "training.seed": seed,
        "training.precision": "fp32",
        "training.epochs": options.epochs,
        "training.evaluate_every_epochs": options.epochs,
        "training.global_batch": 16,
        "training.micro_batch": 16,
        "training.lr_lora": 3e-4,
        "monitor.clips": 0,
        "monitor.projector_clips": 0,
        "training.cpu_threads": 1,
        "training.check_memory": "false",
    }
    if load(find_config(f"ablation/{arm}")).model.llm != "none":
        settings["model.llm"] = llm
    return load(find_config(f"ablation/{arm}"), [f"{key}={value}" for key, value in settings.items()])


def train(accelerator: Accelerator, config: Config, signals: StopSignals) -> None:
    """Train a run, or go on with it, and put what it took beside it."""
    started = time.process_time()
    folder = run(accelerator, config, "resume", Life(accelerator, config, signals))
    spent = time.process_time() - started
    cost = folder / COST
    before = json.loads(cost.read_text())["cpu_seconds"] if cost.is_file() else 0.0
    write_json(cost, {"cpu_seconds": before + spent, "commit": commit()})


def report(options: argparse.Namespace, folders: list[Path]) -> None:
    """Print the tables and write what was asked for."""
    result = ablation(folders)
    text = render_blocks(ablation_blocks(result), "text")
    costs = [json.loads((folder / COST).read_text()) for folder in folders]
    machine = {
        "command": " ".join(["python benchmarks/ablation.py", *sys.argv[1:]]),
        "commit": sorted({cost["commit"] for cost in costs}),
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cpu_minutes_of_training": sum(cost["cpu_seconds"] for cost in costs) / 60,
        "runs": len(folders),
        "versions": versions(PACKAGES),
    }
    print(text)
    print(json.dumps(machine, indent=1))
    if options.json:
        write_json(options.json, {**machine, **result})
    if options.markdown:
        write_text(options.markdown, render_blocks(ablation_blocks(result), "markdown"))


if __name__ == "__main__":
    sys.exit(main())
