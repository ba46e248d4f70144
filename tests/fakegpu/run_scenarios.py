"""Run commands of aullm_dist, each in forked processes, on the fake GPU or on the CPU, and report what they did.

    FAKE_GPU_BUILD=build/fakegpu python tests/fakegpu/run_scenarios.py cuda|cpu SCENARIOS.json

A scenario has `argv` for a `module` with `main`, a `report` to write, `ranks` (variables of each process) and `plant`,
a fault to put into the step: `item`, `copy` or `mix`. `interrupted` are a finished run and a copy of it to resume.
Everything is imported once, before the first fork.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
DEVICE = sys.argv[1]
if DEVICE == "cuda":
    import fake_device
import torch
from host_waits import Watch, watched_types

from aullm_dist.training.step import TrainStep

sys.path.insert(0, str(Path(__file__).parents[1]))
from training_runs import interrupted

WATCHED = (3, 4)
"""Steps in which waits are counted; the first ones fill caches."""
PLANTS = {
    "item": lambda loss: loss + 0 * loss.item(),
    "copy": lambda loss: loss + 0 * loss.detach().cpu().to(loss.device),
    "mix": lambda loss: loss + 0 * torch.ones(2).sum(0, keepdim=True),
}


def watch_steps(plant: str | None, report: dict) -> None:
    """Count the waits of some steps, record the types of the first, and put a fault into them."""
    run, forward = TrainStep.run, TrainStep.forward

    def watched_run(self, *arguments, **named):
        report["steps"] += 1
        if report["steps"] not in WATCHED:
            return run(self, *arguments, **named)
        with Watch() as watch:
            run(self, *arguments, **named)
        report["waits"] += list(watch.found)
        return None

    def watched_forward(self, batch):
        if report["steps"] == 1 and not report["types"]:
            with watched_types(self.model, report["types"]):
                output = forward(self, batch)
        else:
            output = forward(self, batch)
        return (PLANTS[plant](output[0]), output[1]) if plant else output

    TrainStep.run, TrainStep.forward = watched_run, watched_forward


def run(scenario: dict, variables: dict[str, str], path: Path) -> int:
    """Run one process of a scenario and write its report."""
    os.environ.update(variables)
    report = {"steps": 0, "waits": [], "types": {}, "error": None}
    watch_steps(scenario.get("plant"), report)
    try:
        code = importlib.import_module(scenario["module"]).main(scenario["argv"])
    except RuntimeError as error:
        traceback.print_exc()
        code, report["error"] = 1, str(error)
    report |= {"code": code, "tf32": torch.backends.cudnn.allow_tf32, "available": torch.cuda.is_available()}
    report["synchronized"] = len(fake_device.syncs) if DEVICE == "cuda" else 0
    path.write_text(json.dumps(report))
    return code


def main() -> None:
    """Run the scenarios one after the other."""
    for name in ("train", "predict"):
        importlib.import_module(f"aullm_dist.commands.{name}")
    for name in ("accelerate", "deepspeed", "peft", "transformers.models.llama.modeling_llama", "tensorboard"):
        importlib.import_module(name)
    for scenario in json.loads(Path(sys.argv[2]).read_text()):
        if "interrupted" in scenario:
            interrupted(*map(Path, scenario["interrupted"]))
        children = []
        for rank, variables in enumerate(scenario["ranks"]):
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                path = Path(f"{scenario['report']}.{rank}")
                code = 1
                try:
                    code = run(scenario, variables, path)
                finally:
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
