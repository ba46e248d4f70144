"""Loads a sweep: runs trained side by side on one frozen LLM, such as arms and seeds of an ablation; without torch.

Each run has the folder, the settings and the results that it has when it is trained alone. What the processes do
together has to be the same in all of them: the LLM with its LoRA, how it is computed and partitioned, and the job.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aullm_dist.config import (
    Config,
    check_groups,
    checked,
    different_settings,
    find_config,
    load,
    load_strategy,
    to_dict,
)
from aullm_dist.errors import UserError
from aullm_dist.files import user_path

ALIKE = (
    "model.llm",
    "model.llm_architecture",
    "model.llm_hidden",
    "model.llm_layers",
    "model.trust_remote_code",
    "model.quantization",
    "model.attention",
    "model.packing",
    "model.suffixes_per_row",
    "model.suffix_multiple",
    "model.activation_checkpointing",
    "model.compile",
    "model.lora_rank",
    "model.lora_alpha",
    "model.lora_dropout",
    "model.lora_targets",
    "model.kernels",
    "training.strategy",
    "training.processes",
    "training.folds_at_once",
    "training.cpu_threads",
    "training.precision",
    "training.global_batch",
    "training.micro_batch",
    "training.deterministic",
    "training.grace_seconds",
    "training.max_failures",
)
"""Settings that the runs of a sweep have in common: of the LLM and its LoRA, of its passes, of processes and job."""
_GIVEN_BY_SWEEP = {
    "training.output": "each run has a folder of its own below --out; leave it out",
    "training.folds_at_once": "the runs of a sweep share the processes; give --at-once",
}
_ALONE = "train it by aullm-dist train"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A sweep as a user asks for it."""

    files: Sequence[str] = ()
    """Run files, or names of shipped ones."""
    overrides: Sequence[str] = ()
    """`section.key=value`, for all runs."""
    seeds: Sequence[int] = ()
    """Each run is trained with each of them; none leaves the run files' own."""
    out: Path
    at_once: str = "auto"
    """Folds that are trained side by side: `auto`, or a number."""
    listed: Path | None = None
    """A file with more runs, `CONFIG [section.key=value ...]` on each line, each with a `training.output`."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Runs that go together."""

    folder: Path
    """Where the job of all of them leaves its marker and record."""
    configs: dict[str, Config]
    """By name, which is that of the run folder."""

    @property
    def is_one(self) -> bool:
        """Whether it is one run, trained as such and without a name."""
        return list(self.configs) == [""]

    @property
    def first(self) -> Config:
        """The configuration of the first run, which stands for all in what they have in common."""
        return next(iter(self.configs.values()))


def load_sweep(request: Request) -> Sweep:
    """Return the runs of a sweep.

    Raises:
        UserError: a run file or an override cannot be used, or runs do not go together; the message says which setting.
    """
    _refuse_what_the_sweep_gives(request)
    found: list[tuple[str, Config]] = []
    for file in request.files:
        name = user_path(file).name.removesuffix(".yaml")
        found += _of_seeds(request, file, [], request.out / name)
    for line, words in _lines(request.listed):
        own = [word.partition("=")[2] for word in words[1:] if word.startswith("training.output=")]
        if len(own) != 1:
            raise UserError(
                f"{line}: gives training.output {len(own)} times; allowed: once, as each run needs a folder"
            )
        settings = [word for word in words[1:] if not word.startswith("training.output=")]
        found += _of_seeds(request, words[0], settings, user_path(own[0]))
    if not found:
        raise UserError("no run is given; aullm-dist sweep CONFIG [CONFIG ...] --out FOLDER")
    configs: dict[str, Config] = {}
    for name, config in found:
        if name in configs:
            raise UserError(f"two runs would be trained in {config.training.output}; give each run file once")
        configs[name] = config
    for name, config in configs.items():
        _refuse_what_cannot_share(name, config)
    _refuse_differences(configs)
    return Sweep(request.out, configs)


def check_engine(sweep: Sweep, processes: int) -> None:
    """Refuse an engine that holds what is trained of one model, where models take turns.

    Raises:
        UserError: naming what is allowed.
    """
    training = sweep.first.training
    check_groups(training, processes)
    strategy = load_strategy(training.strategy)
    if strategy.deepspeed is None or (strategy.stage == 3 and processes > 1 and training.folds_at_once != 1):
        return
    at_once = f" and --at-once {training.folds_at_once}" if strategy.stage == 3 else ""
    raise UserError(
        f"training.strategy is {strategy.name} with {processes} process{'es' * (processes > 1)}{at_once}; allowed in a "
        "sweep: ddp, or zero3 with several processes and --at-once auto or above 1"
    )


def _refuse_what_the_sweep_gives(request: Request) -> None:
    seeded = {"training.seed": "--seeds gives it; keep one of them"} if request.seeds else {}
    for override in request.overrides:
        key = override.partition("=")[0].strip()
        why = (_GIVEN_BY_SWEEP | seeded).get(key)
        if why is not None:
            raise UserError(f"override {override!r}: {why}")
    for seed in request.seeds:
        if list(request.seeds).count(seed) > 1:
            raise UserError(f"--seeds gives {seed} twice; keep one")
    if request.at_once != "auto" and not (request.at_once.isascii() and request.at_once.isdigit()):
        raise UserError(f"--at-once is {request.at_once!r}; allowed: a number from 1, or auto")


def _of_seeds(request: Request, file: str, settings: list[str], folder: Path) -> list[tuple[str, Config]]:
    """Return name and configuration of a run with each seed."""
    path = find_config(file)
    if load(path, settings).model.llm == "none":
        # Before an override for all gives it an LLM, and makes another model of it.
        raise UserError(f"{file}: has no LLM that it could share (model.llm: none); {_ALONE}")
    config = load(path, [*settings, *request.overrides])
    at_once = "auto" if request.at_once == "auto" else int(request.at_once)
    found = []
    seeds: Sequence[int | None] = request.seeds or [None]
    for seed in seeds:
        output = folder if seed is None else folder.with_name(f"{folder.name}-{seed}")
        values: dict[str, object] = {"training.output": str(output), "training.folds_at_once": at_once}
        values |= {} if seed is None else {"training.seed": seed}
        source = f"{file} with --at-once" + ("" if seed is None else " and --seeds")
        found.append((_name(request.out, output), checked(config.changed(values), source)))
    return found


def _name(out: Path, folder: Path) -> str:
    return str(folder.relative_to(out)) if folder.is_relative_to(out) else str(folder)


def _lines(listed: Path | None) -> list[tuple[str, list[str]]]:
    """Return the runs of a file, each with the place where it stands."""
    if listed is None:
        return []
    try:
        lines = listed.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--runs {listed}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--runs {listed}: is not UTF-8 text") from error
    found = []
    for number, line in enumerate(lines, start=1):
        place = f"{listed}, line {number}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(f"{place}: {str(error).lower()}; a word with blanks stands in quotes") from error
        if words:
            found.append((place, words))
    return found


def _refuse_what_cannot_share(name: str, config: Config) -> None:
    if config.model.llm == "none":
        raise UserError(f"{name}: has no LLM that it could share (model.llm: none); {_ALONE}")
    if config.model.compile != "none":
        raise UserError(
            f"{name}: model.compile is {config.model.compile!r}; allowed in a sweep: none, as the runs' rows differ in "
            "length"
        )


def _refuse_differences(configs: dict[str, Config]) -> None:
    (first, expected), *others = ((name, to_dict(config)) for name, config in configs.items())
    for name, found in others:
        for key in different_settings(expected, found):
            if key in ALIKE:
                group, _, short = key.partition(".")
                raise UserError(
                    f"{name}: {key} is {found[group][short]!r}, but {expected[group][short]!r} in {first}; the runs of "
                    f"a sweep share LLM and processes, so it must be the same; give it for all, or {_ALONE}"
                )
