"""Saves and loads checkpoints: trained weights and optimizer state, in a folder that is verified or not there.

    checkpoints/step-00000120/
        adapter_model.safetensors, adapter_config.json   LoRA for stock PEFT and the plain LLM; absent without one
        aullm_modules.safetensors, aullm_config.json     everything of ours outside the LLM, and what defines it
        optimizer.safetensors    "<parameter>.master" (fp32) and the optimizer's entries ("<parameter>.exp_avg", ...)
        trainer_state.json       step, consumed samples, epoch, seed, ...: whatever the trainer hands over
        MANIFEST.json            written last: see `manifest`

Every tensor is stored whole under its parameter's name, so the world size that wrote it does not matter. The learning
rates are a function of the step and the rest of the param groups comes from the config, so neither is stored. Nothing
is pickled.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aullm_dist.checkpoint.atomic import staged_folder, step_folder_name, write_durably
from aullm_dist.checkpoint.compatibility import ExpectedModel, StoredModel, listing, refuse_other_model
from aullm_dist.checkpoint.entries import ManifestFacts, ParameterEntry
from aullm_dist.checkpoint.manifest import (
    VerifyMode,
    read_manifest,
    tensor_table,
    verify_checkpoint,
    write_manifest,
)
from aullm_dist.checkpoint.retention import clean_leftovers
from aullm_dist.checkpoint.tensor_plan import (
    ADAPTER_FILE,
    MODULES_FILE,
    PlannedTensor,
    active_adapter,
    peft_model_of,
    plan_tensors,
)
from aullm_dist.distributed import engine_state
from aullm_dist.errors import CheckpointError, UserError
from aullm_dist.files import force_to_disk, read_json
from aullm_dist.llm.identity import BaseIdentity
from aullm_dist.signed import json_bytes

ADAPTER_CONFIG_FILE = "adapter_config.json"
MODULES_CONFIG_FILE = "aullm_config.json"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "trainer_state.json"

TensorFiles = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What a checkpoint records of the run that saves it, the same at every step."""

    config: Mapping[str, Any]
    """The resolved config of the run; recorded, never compared."""
    model_config: Mapping[str, Any]
    """What defines the model's function, with `aus`, the AU numbers in the order of the head's units."""
    base: BaseIdentity | None = None
    """Identity of the LLM's weights (`base_identity`), None without an LLM."""
    quantized_modules: Sequence[str] = ()
    """Names, as on the plain LLM, of the linear layers that were really quantised."""
    world_size: int = 1
    """Number of processes of the run."""


def save_checkpoint(
    root: Path | str,
    step: int,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: Mapping[str, Any],
    run: RunFacts,
    is_writer: bool = True,
) -> Path:
    """Write `root/step-<step>`; afterwards it is complete, verified against its manifest, and on disk.

    Every process calls it, because an engine may have to gather; only the writer touches the disk, and only the writer
    raises. Telling the others, and the barrier behind a save, are the caller's. A checkpoint of the same step is
    replaced.

    Args:
        root: Folder that holds the checkpoints of one run; leftovers of killed saves in it are removed.
        step: Optimizer steps completed.
        model: The plain model (see `tensor_plan`), not a wrapper of it.
        optimizer: The optimizer, or Accelerate's wrapper of it; None writes the masters alone.
        state: Trainer state: JSON values with string keys, so that what is read back is equal.
        run: What is recorded of the run.
        is_writer: Whether this process writes.

    Returns:
        The folder, on every process.

    Raises:
        CheckpointError: If a trainable is missing, doubled, of size 0, not finite or without its optimizer state, if
            `state` cannot be JSON, or if the disk refuses. Earlier checkpoints are untouched.
    """
    target = Path(root) / step_folder_name(step)
    plan = plan_tensors(model)
    files = _gather(plan, optimizer, is_writer)
    if not is_writer:
        return target
    problems = _completeness_problems(model, plan, files, optimizer, step)
    if problems:
        raise CheckpointError(f"checkpoint of step {step} would not be complete: {listing(problems)}")
    texts = {
        STATE_FILE: _state_text({**state, "step": step}),
        MODULES_CONFIG_FILE: _json_text("model config", dict(run.model_config)),
    }
    if ADAPTER_FILE in files:
        texts[ADAPTER_CONFIG_FILE] = json_bytes(_adapter_config(model, run.base))
    facts = ManifestFacts(
        parameters={item.name: _parameter_entry(item, files) for item in plan if item.is_parameter},
        quantized_modules=tuple(sorted(run.quantized_modules)),
        base=run.base,
        config=run.config,
    )
    _json_text("config or base identity", facts.facts_to_json())
    try:
        clean_leftovers(target.parent)
        with staged_folder(target) as folder:
            _write_files(folder, files, texts)
            write_manifest(folder, step=step, world_size=run.world_size, facts=facts)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {target} could not be written: {error}") from error
    return target


@dataclass(frozen=True, slots=True)
class SavedState:
    """A checkpoint that was read and is of the model at hand, of which nothing has been changed yet."""

    trainer: dict[str, Any]
    """The trainer state as it was handed to `save_checkpoint`, with `step`."""
    plan: list[PlannedTensor]
    values: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]

    def apply(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Overwrite the model it was read for, and the optimizer if given; an engine may talk, so every process calls.

        With an optimizer the parameters come from the fp32 masters, without one from the model files in the dtype that
        the run computed with; in an fp32 run these are the same bits.
        """
        for item in self.plan:
            entries = dict(self.optimizer.get(item.name, {}))
            master = entries.pop("master", None) if optimizer is not None else None
            engine_state.set_tensor(item.tensor, self.values[item.name] if master is None else master)
            if optimizer is not None and item.trainable:
                engine_state.set_optimizer_state(optimizer, item.tensor, entries)


def read_checkpoint(
    folder: Path | str,
    model: nn.Module,
    *,
    with_optimizer: bool,
    model_config: Mapping[str, Any] | None = None,
    base: BaseIdentity | None = None,
    mode: VerifyMode = "hash",
) -> SavedState:
    """Read a checkpoint and check that it is complete and of this model, without talking to other processes.

    Args:
        folder: A checkpoint folder.
        model: A model like the one that was saved (see `tensor_plan`).
        with_optimizer: Whether the optimizer is to be restored as well; then the same parameters must be trained.
        model_config: What defines this model; compared when given, key by key.
        base: Identity of this run's LLM; compared when given.
        mode: How the files are verified (`verify_checkpoint`).

    Raises:
        UserError: If a file is missing, truncated or altered, or if the checkpoint is of another model.
    """
    folder = Path(folder)
    problems = verify_checkpoint(folder, mode)
    if problems:
        raise UserError(f"checkpoint {folder} is refused: {listing(problems)}")
    manifest = read_manifest(folder)
    plan = plan_tensors(model)
    stored = StoredModel(
        tensors=manifest.tensors,
        parameters=manifest.parameters,
        base=manifest.base,
        config=read_json(folder / MODULES_CONFIG_FILE),
        adapter=read_json(folder / ADAPTER_CONFIG_FILE) if ADAPTER_CONFIG_FILE in manifest.files else None,
    )
    adapter = _adapter_config(model, None) if peft_model_of(model) is not None else None
    expected = ExpectedModel(plan=plan, config=model_config, base=base, adapter=adapter)
    refuse_other_model(folder, stored, expected, with_optimizer=with_optimizer)
    tensors = {name: load_file(folder / name) for name in (ADAPTER_FILE, MODULES_FILE) if name in manifest.files}
    return SavedState(
        trainer=read_json(folder / STATE_FILE),
        plan=plan,
        values={item.name: tensors[item.file][item.key] for item in plan},
        optimizer=_read_optimizer(folder) if with_optimizer else {},
    )


def _gather(plan: list[PlannedTensor], optimizer: torch.optim.Optimizer | None, is_writer: bool) -> TensorFiles:
    """Collect whole tensors on the CPU, by file and key; the other processes take part and keep nothing."""
    files: TensorFiles = {}

    def keep(file: str, key: str, value: Tensor) -> None:
        if is_writer:
            files.setdefault(file, {})[key] = value.cpu().contiguous()

    for item in plan:
        keep(item.file, item.key, engine_state.full_tensor(item.tensor))
        if not item.trainable:
            continue
        keep(OPTIMIZER_FILE, f"{item.name}.master", engine_state.full_master(item.tensor))
        entries = engine_state.optimizer_state(optimizer, item.tensor) if optimizer is not None else {}
        for key, value in entries.items():
            # A copy, because safetensors refuses tensors that share storage, as `step` may; not one on the GPU.
            keep(OPTIMIZER_FILE, f"{item.name}.{key}", torch.as_tensor(value).detach().to("cpu", copy=True))
    return files


def _completeness_problems(
    model: nn.Module,
    plan: list[PlannedTensor],
    files: TensorFiles,
    optimizer: torch.optim.Optimizer | None,
    step: int,
) -> list[str]:
    """Return what would make the checkpoint incomplete, one phrase per tensor."""
    planned = Counter(item.name for item in plan)
    problems = [
        f"{name}: trainable, but in the checkpoint {planned[name]} times"
        for name, param in model.named_parameters()
        if param.requires_grad and planned[name] != 1
    ]
    places = Counter((item.file, item.key) for item in plan)
    problems += [
        f"{key}: {count} tensors would share this place in {file}" for (file, key), count in places.items() if count > 1
    ]
    for item in plan:
        value = files[item.file][item.key]
        if item.is_parameter and value.numel() == 0:
            problems.append(f"{item.name}: size 0")
        if item.is_parameter:  # a buffer may hold infinities on purpose, a mask for one
            problems += _not_finite(item.name, value)
        if tuple(value.shape) != engine_state.full_shape(item.tensor):
            problems.append(
                f"{item.name}: shape {tuple(value.shape)} instead of {engine_state.full_shape(item.tensor)}"
            )
    for key, value in files.get(OPTIMIZER_FILE, {}).items():
        if not key.endswith(".master"):
            problems += _not_finite(key, value)
    if optimizer is not None:
        problems += _optimizer_problems(plan, files.get(OPTIMIZER_FILE, {}), optimizer, step)
    return problems


def _optimizer_problems(
    plan: list[PlannedTensor], tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int
) -> list[str]:
    """Every trainable is in one param group, and every parameter that was stepped has all of its entries."""
    members = Counter(id(param) for param in engine_state.grouped_parameters(optimizer))
    entries = _by_parameter(tensors)
    stepped = {name: set(values) - {"master"} for name, values in entries.items() if len(values) > 1}
    complete = set().union(*stepped.values())
    problems = []
    for item in (item for item in plan if item.trainable):
        if members[id(item.tensor)] != 1:
            problems.append(f"{item.name}: trainable, but in {members[id(item.tensor)]} param groups of the optimizer")
        missing = complete - stepped.get(item.name, complete)
        if missing:
            problems.append(f"{item.name}: optimizer state lacks {sorted(missing)}")
        for key, value in entries.get(item.name, {}).items():
            if key.startswith("exp_avg") and tuple(value.shape) != engine_state.full_shape(item.tensor):
                problems.append(f"{item.name}.{key}: shape {tuple(value.shape)} differs from the parameter's")
    if step > 0 and entries and not stepped:
        problems.append(f"no parameter has optimizer state after {step} steps")
    return problems


def _not_finite(name: str, value: Tensor) -> list[str]:
    if not value.is_floating_point():
        return []
    bad = int(value.numel() - torch.isfinite(value).sum())
    return [f"{name}: {bad} of {value.numel()} values are not finite"] if bad else []


def _write_files(folder: Path, files: TensorFiles, texts: dict[str, bytes]) -> None:
    for name, text in texts.items():
        write_durably(folder / name, text)
    # safetensors makes files that the owner alone can read; a group shares its checkpoints as it shares other files.
    mode = (folder / STATE_FILE).stat().st_mode
    for name, tensors in files.items():
        path = folder / name
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)
        force_to_disk(path)
        written = {key: entry.shape for key, entry in tensor_table(path).items()}
        if written != {key: tuple(value.shape) for key, value in tensors.items()}:
            raise CheckpointError(f"{name} does not hold the tensors that were written to it; nothing was kept")


def _adapter_config(model: nn.Module, base: BaseIdentity | None) -> dict[str, Any]:
    """Return adapter_config.json as PEFT writes it for inference, with sets sorted: equal runs write equal bytes."""
    peft_model = peft_model_of(model)
    assert peft_model is not None, "only a model with an adapter has a config of it"
    values = peft_model.peft_config[active_adapter(peft_model)].to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(values.items())}
    config["inference_mode"] = True
    config["task_type"] = config["task_type"] or "CAUSAL_LM"
    if base is not None:
        config["base_model_name_or_path"] = base.name
    return config


def _parameter_entry(item: PlannedTensor, files: TensorFiles) -> ParameterEntry:
    saved = _by_parameter(files.get(OPTIMIZER_FILE, {})).get(item.name, {})
    return ParameterEntry(file=item.file, key=item.key, trainable=item.trainable, optimizer=tuple(sorted(saved)))


def _by_parameter(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split "<parameter>.<entry>" keys; entry names hold no dot, so the last dot is the border."""
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, entry = key.rsplit(".", 1)
        grouped.setdefault(name, {})[entry] = value
    return grouped


def _read_optimizer(folder: Path) -> dict[str, dict[str, Tensor]]:
    return _by_parameter(load_file(folder / OPTIMIZER_FILE))


def _json_text(what: str, value: Any) -> bytes:
    try:
        return json_bytes(value)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the {what} cannot be written as JSON: {error}") from error


def _state_text(state: dict[str, Any]) -> bytes:
    """Return the trainer state as JSON, refusing what would come back changed (a tuple, a key that is no string)."""
    text = _json_text("trainer state", state)
    back = json.loads(text)
    changed = sorted(key for key in back.keys() | state.keys() if back.get(key) != state.get(key))
    if changed:
        raise CheckpointError(f"the trainer state would not come back from JSON as it is: {changed}")
    return text
