"""Run commands of aullm_dist, each in forked processes, on the fake GPU or on the CPU, and report what they did.

    FAKE_GPU_BUILD=build/fakegpu python tests/fakegpu/run_scenarios.py cuda|cpu SCENARIOS.json

A scenario has `argv` for a `module` with `main`, a `report` to write, `ranks` (variables of each process) and `plant`,
a fault to put into the step: `item`, `copy` or `mix`. `interrupted` are a finished run and a copy of it to resume.
With `kernels` the device has the compute capability of a Hopper, and what Triton would compile it interprets.
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

from aullm_dist.model.aullm import AULLM
from aullm_dist.training.heldout import HeldOut
from aullm_dist.training.step import TrainStep

sys.path.insert(0, str(Path(__file__).parents[1]))
from training_runs import interrupted

WATCHED = (3, 4)
"""Steps in which waits are counted; the first ones fill caches."""
ANSWERS = {"answered": (HeldOut, "_logits"), "explained": (AULLM, "explain")}
"""What answers clips, batch by batch: its calls are counted under these names, and watched but for the first
of each model, which fills caches."""
PLANTS = {
    "item": lambda loss: loss + 0 * loss.item(),
    "copy": lambda loss: loss + 0 * loss.detach().cpu().to(loss.device),
    "mix": lambda loss: loss + 0 * torch.ones(2).sum(0, keepdim=True),
}


def watch_steps(plant: str | None, watched: tuple[int, ...], report: dict) -> None:
    """Count the waits of some steps, record the types of the first, and put a fault into them."""
    run, forward = TrainStep.run, TrainStep.forward

    def watched_run(self, *arguments, **named):
        report["steps"] += 1
        if report["steps"] not in watched:
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


def watch_answers(report: dict) -> None:
    """Count the waits of batches that are answered, by what answers them, and record the types of the first."""
    for name, (place, function) in ANSWERS.items():
        setattr(place, function, _watched_answer(getattr(place, function), name, report))


def _watched_answer(real, name: str, report: dict):
    seen = []

    def watched(*arguments, **named):
        model = next(argument for argument in arguments if isinstance(argument, torch.nn.Module))
        report[name] += 1
        if any(model is other for other in seen):
            with Watch() as watch:
                found = real(*arguments, **named)
            report["answer_waits"] += [f"{name}: {what}" for what in watch.found]
            return found
        seen.append(model)
        with watched_types(model, report["answer_types"]):
            return real(*arguments, **named)

    return watched


def interpret_kernels() -> None:
    """Have the device be one that there are kernels for, and Triton's interpreter take the compiler's place."""
    from aullm_kernels import dispatch

    fake_device.CAPABILITY = (9, 0)
    dispatch._interprets = lambda: False
    dispatch.start_obstacle = lambda device: None


def run(scenario: dict, variables: dict[str, str], path: Path) -> int:
    """Run one process of a scenario and write its report."""
    os.environ.update(variables)
    report = {"steps": 0, "waits": [], "types": {}, "error": None}
    report |= dict.fromkeys(ANSWERS, 0) | {"answer_waits": [], "answer_types": {}}
    watch_steps(scenario.get("plant"), (2,) if scenario.get("kernels") else WATCHED, report)
    watch_answers(report)
    if scenario.get("kernels"):
        interpret_kernels()
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
            usage = os.wait4(child, 0)[2]
            seconds = usage.ru_utime + usage.ru_stime
            sys.stdout.write(f"{Path(scenario['report']).name}: {seconds:.1f} s of CPU time\n")


if __name__ == "__main__":
    main()
