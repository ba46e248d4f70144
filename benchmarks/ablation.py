"""Every arm of the ablation on small synthetic corpora: train, compare with the full model, print the tables.

    python benchmarks/ablation.py --out DIR [--seeds 0 1 2] [--arms NAME ...] [--json FILE] [--markdown FILE]

Corpora in the layouts of CASME II, SAMM and 4DME are written and prepared twice: with no camera of their own, to train
on, and under vignette, rolling bands and gain drift, to test on. Neither a training clip nor an intervention has those.
The arms are the shipped run files `ablation/*`, on the six ordered pairs of corpora and on five groups of subjects of
the first, with a tiny random LLM. One process, one thread; a finished run is not trained again, a broken off one goes
on, so the command may be stopped and repeated. Nothing here may be changed by looking at its tables.
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
from aullm_dist.data.prepare import prepare
from aullm_dist.data.synthetic import SyntheticSpec, write_corpus
from aullm_dist.evaluation.blocks import render_blocks
from aullm_dist.evaluation.metrics import summarise
from aullm_dist.files import write_text
from aullm_dist.model.tiny import build_tiny_backbone
from aullm_dist.report.ablation import ablation, problem_of
from aullm_dist.report.ablation_table import ablation_blocks
from aullm_dist.signals import StopSignals
from aullm_dist.training import context
from aullm_dist.training.life import Life
from aullm_dist.training.run import run

CORPORA = ("casme2", "samm", "4dme")
GROUPED = CORPORA[0]
SEEN, HELD_OUT = "none", "vignette_banding"
ARMS = (
    "full",
    *(name for name in (path.removeprefix("ablation/") for path in shipped_names("ablation")) if name != "full"),
)
SIZE, AMPLITUDE, FRAMES = 48, 5.0, (12, 24)
COST = "cost.json"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy")


def main() -> int:
    """Train what is not trained yet, and print the tables of what there is."""
    options = parse_arguments()
    # The log of hundreds of runs says nothing that their folders do not.
    log.set_up(30)
    datasets = write_datasets(options)
    llm = options.out / "llm"
    if not (llm / "config.json").is_file():
        build_tiny_backbone(llm, hidden=64, layers=2, heads=4)
    sides = [("grouped", GROUPED, GROUPED), *(("cross", *pair) for pair in permutations(CORPORA, 2))]
    wanted = [(seed, side, arm) for seed in options.seeds for side in sides for arm in options.arms]
    accelerator, signals, folders = None, StopSignals(), []
    for number, (seed, side, arm) in enumerate(wanted, start=1):
        config = configuration(options, datasets, llm, arm, seed, side)
        folder = Path(config.training.output)
        folders.append(folder)
        if problem_of(folder) is None and (folder / COST).is_file():
            continue
        accelerator = accelerator or context.start(config.training)
        train(accelerator, config, signals)
        cost = json.loads((folder / COST).read_text())["cpu_seconds"]
        print(f"{number}/{len(wanted)} {folder.relative_to(options.out)}: {cost:.1f} s of CPU", flush=True)
    report(options, folders)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="corpora and runs; used again if there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="training seeds (0 1 2)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, metavar="NAME", help="arms (all)")
    parser.add_argument("--subjects", type=int, default=12, metavar="N", help="subjects of each corpus (12)")
    parser.add_argument("--clips", type=int, default=5, metavar="N", help="clips of each subject (5)")
    parser.add_argument("--epochs", type=int, default=8, metavar="N", help="epochs of each training (8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables here")
    options = parser.parse_args()
    options.out = options.out.resolve()
    return options


def write_datasets(options: argparse.Namespace) -> dict[tuple[str, str], Path]:
    """Write and prepare each corpus without a camera of its own and under the held-out one."""
    found = {}
    for corpus in CORPORA:
        for shift in (SEEN, HELD_OUT):
            name = f"{corpus}-{shift}-{options.subjects}x{options.clips}"
            found[corpus, shift] = options.out / "data" / name
            if (found[corpus, shift] / "report.json").is_file():
                continue
            spec = SyntheticSpec(
                corpus=corpus, subjects=options.subjects, clips_per_subject=options.clips, shift=shift,
                amplitude_percent=AMPLITUDE, balance=1.0, num_frames=FRAMES,
            )  # fmt: skip
            raw = write_corpus(spec, options.out / "raw" / name)
            prepare(corpus, raw, found[corpus, shift], size=SIZE, num_workers=1)
    return found


def configuration(
    options: argparse.Namespace,
    datasets: dict[tuple[str, str], Path],
    llm: Path,
    arm: str,
    seed: int,
    side: tuple[str, str, str],
) -> Config:
    """Return an arm's run file with the data of a test side (protocol, training corpus, test corpus)."""
    protocol, source, target = side
    place = f"grouped-{source}" if protocol == "grouped" else f"{source}-to-{target}"
    test = [] if protocol == "grouped" else [str(datasets[target, HELD_OUT])]
    settings = {
        "data.train": json.dumps([str(datasets[source, SEEN])]),
        "data.test": json.dumps(test),
        "data.protocol": protocol,
        "data.folds": 5,
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
        "training.global_batch": 8,
        "training.micro_batch": 8,
        "training.lr_lora": 3e-4,
        "training.cpu_threads": 1,
        "training.check_memory": "false",
    }
    if arm != "led_cnn":
        settings["model.llm"] = llm
    return load(find_config(f"ablation/{arm}"), [f"{key}={value}" for key, value in settings.items()])


def train(accelerator: Accelerator, config: Config, signals: StopSignals) -> None:
    """Train a run, or go on with it, and put what it took beside it."""
    started = time.process_time()
    folder = run(accelerator, config, "resume", summarise, Life(accelerator, config, signals))
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
