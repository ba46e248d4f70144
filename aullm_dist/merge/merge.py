"""Merges LoRA into its LLM: a dense Hugging Face folder, written tensor by tensor in memory that is set beforehand.

Nothing of the base is mapped or held whole. Two bases can take the deltas. `nf4-exact`: where the run held a layer in
NF4, the delta goes onto what NF4 made of the weight, which is what the adapter was trained on. `bf16`: it goes onto
the original weights, the usual merge, which is another function than the one that was trained. Everything that NF4 did
not touch stays as it is in both.
"""

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PretrainedConfig

from aullm_dist.checkpoint.base_identity import base_differences, base_identity
from aullm_dist.checkpoint.entries import Manifest
from aullm_dist.checkpoint.manifest import read_manifest, verify_checkpoint
from aullm_dist.errors import UserError
from aullm_dist.files import is_new_or_empty, read_json, write_text
from aullm_dist.llm.base_check import check_base
from aullm_dist.llm.files import load_config, load_tokenizer, local_folder
from aullm_dist.llm.identity import BaseIdentity
from aullm_dist.llm.quantization import is_stored_in_nf4
from aullm_dist.llm.stored.weight_files import WeightFiles, check_space, files_beside_weights
from aullm_dist.llm.stored.wrappers import alone, alone_in_file, is_for_pictures, open_base
from aullm_dist.log import get_logger
from aullm_dist.merge.adapter import Adapter
from aullm_dist.merge.compute import Arithmetic
from aullm_dist.merge.journal import finished_receipt, open_journal, remove_leftovers
from aullm_dist.merge.logit_errors import probe_errors
from aullm_dist.merge.memory import PeakMemory
from aullm_dist.merge.pipeline import Done, num_workers, run_merge
from aullm_dist.merge.plan import Plan, plan_merge, size_pieces
from aullm_dist.runs.recorded import find_base
from aullm_dist.versions import library_versions

logger = get_logger(__name__)

Base = Literal["nf4-exact", "bf16"]
BASES: tuple[Base, ...] = get_args(Base)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NOTES = {
    "nf4-exact": "LoRA was added to the weights as NF4 has them, which is what it was trained on; the LLM is "
    "dense, but no finer than NF4",
    "bf16": "LoRA was added to the original weights of the base",
    "bf16 after nf4": "LoRA was trained on NF4 weights and added to the original ones: answers are not those of "
    "the model that was trained and evaluated",
}


@dataclass(frozen=True, slots=True)
class MergeReceipt:
    """What a merge did; JSON-able by `as_dict`."""

    base: Base
    dtype: str
    note: str
    """What that means, in a sentence for the model card."""
    llm: str
    """Name or folder of the base, as the checkpoint has it."""
    base_files: dict[str, Any]
    """The base's weight files: size and hash of samples (`base_identity`)."""
    checkpoint: str
    step: int
    checkpoint_sha256: str
    """The hash in the checkpoint's manifest."""
    files: dict[str, str]
    """SHA-256 of each weight file that was written."""
    bytes: int
    """Bytes of these files."""
    resumed_bytes: int
    """How many of them a killed merge had written before."""
    tensors: int
    merged: int
    """Tensors that LoRA changed."""
    adapter_tensors: int
    """Tensors of the adapter, each used once."""
    seconds: float
    mb_per_second: float
    """10^6 bytes written per second, until they were on disk."""
    peak_bytes: int
    """Anonymous memory above what the libraries took, at most."""
    max_ram_bytes: int
    probe: dict[str, Any] | None
    """Errors of both bases on the probe prompts (`merge_probe.probe_errors`), None if they were not asked for."""

    def as_dict(self) -> dict[str, Any]:
        """Return the receipt as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Job:
    """What is merged: everything that the bytes depend on."""

    checkpoint: Path
    manifest: Manifest
    saved: BaseIdentity
    """The LLM that the adapter was trained on, as the checkpoint has it."""
    folder: Path
    """Of the base."""
    config: PretrainedConfig
    identity: BaseIdentity
    base: Base
    dtype: torch.dtype
    stored_in_nf4: bool

    @property
    def compute(self) -> torch.dtype:
        """The dtype that the run computed in."""
        return torch.bfloat16 if self.manifest.config["training"]["precision"] == "bf16" else torch.float32

    @property
    def manifest_sha256(self) -> str:
        """The hash that the checkpoint's manifest carries."""
        assert self.manifest.manifest_sha256 is not None, "a manifest that was read has its hash"
        return self.manifest.manifest_sha256

    def key(self) -> dict[str, Any]:
        """Return what must be equal for a merge to resume where another was killed."""
        versions = library_versions()
        return {
            "checkpoint": self.manifest_sha256,
            "llm": self.identity.files_to_json(),
            **({} if self.identity.wrapper is None else {"decoder": self.identity.wrapper}),
            "base": self.base,
            "dtype": str(self.dtype),
            "versions": {name: versions.get(name) for name in ("aullm-dist", "torch", "bitsandbytes")},
        }


@dataclass(frozen=True, slots=True)
class _Target:
    """Where a merge writes."""

    out: Path
    partial: Path
    """Unfinished work; it becomes `out` when it is complete."""


def merge_llm(
    checkpoint: Path,
    out: Path,
    *,
    base: Base | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_ram: int = 4 * 2**30,
    probe: Sequence[str] | None = None,
    llm: Path | None = None,
    partial: Path | None = None,
) -> MergeReceipt:
    """Write the LLM of a checkpoint with its LoRA merged, as an ordinary Hugging Face folder.

    A merge that was killed resumes when it is asked for again, and ends in the same bytes.

    Args:
        checkpoint: a checkpoint folder (`retention.find_checkpoint`).
        out: the folder to be written: absent, or empty.
        base: what the deltas are added to; None takes `nf4-exact` for a run in NF4 and `bf16` for others.
        dtype: of the new weights.
        max_ram: bytes of anonymous memory that the merge may take, above what the libraries take.
        probe: prompts on which the errors of both bases are measured; this reads the LLM several times over.
        llm: where the base is; None asks the checkpoint.
        partial: where unfinished work is kept; None takes `OUT.partial`. It must be on the disk of `out`.

    Raises:
        UserError: checkpoint and base do not belong together or are damaged, too little disk or memory, `out` holds
            something. `out` is then as it was.
    """
    started = time.monotonic()
    partial = partial or out.with_name(f"{out.name}.partial")
    job = _job(checkpoint, base, dtype, llm)
    if not is_new_or_empty(out):
        if (content := finished_receipt(partial, job.key())) is not None:
            remove_leftovers(partial)
            return MergeReceipt(**content)
        raise UserError(f"{out}: exists and is not empty; give a folder that does not exist")
    files = open_base(job.folder, job.config)
    if job.identity.wrapper is not None:
        job = replace(job, config=alone(job.config, files.tensors))
    try:
        adapter = Adapter(job.checkpoint)
        if job.base == "nf4-exact" and any(delta.magnitude for delta in adapter.deltas.values()):
            # PEFT itself does not merge to what it computes with DoRA on NF4 weights.
            raise UserError(f"{adapter.path}: is DoRA, which is not merged onto NF4 weights; allowed: --base bf16")
        with PeakMemory() as peak:
            receipt = _merge(job, files, adapter, _Target(out, partial), max_ram, probe, peak, started)
        adapter.close()
    finally:
        files.close()
    return receipt


def _job(checkpoint: Path, base: Base | None, dtype: torch.dtype, llm: Path | None) -> _Job:
    problems = verify_checkpoint(checkpoint)
    if problems:
        raise UserError(f"checkpoint {checkpoint} is refused: {problems[0]}")
    manifest = read_manifest(checkpoint)
    saved = manifest.base
    if saved is None:
        raise UserError(f"checkpoint {checkpoint}: has no LLM; there is nothing to merge")
    folder = local_folder(llm or find_base(saved, manifest.config, checkpoint))
    config = load_config(str(folder), {"trust_remote_code": False, "local_files_only": True})
    check_base(str(folder), folder, config)
    identity = base_identity(str(folder.absolute()), config.to_dict(), folder, hash_files=saved.is_fully_hashed)
    differences = base_differences(saved, identity)
    if differences:
        raise UserError(f"checkpoint {checkpoint}: is of another LLM ({differences[0]}); give its own with --llm")
    if not saved.files:
        logger.warning("%s: the run kept no hashes of the files of %s; only the configs are compared",
                       checkpoint, saved.name)  # fmt: skip
    was_quantised = bool(manifest.quantized_modules)
    stored = is_stored_in_nf4(str(folder), config, "nf4")
    chosen = base or ("nf4-exact" if was_quantised else "bf16")
    if chosen == "nf4-exact" and not was_quantised:
        raise UserError(f"--base nf4-exact: the run of {checkpoint} held no layer in NF4; allowed: bf16")
    if chosen == "bf16" and stored:
        raise UserError(f"--base bf16: {folder} holds its weights in NF4 alone; allowed: nf4-exact")
    return _Job(checkpoint, manifest, saved, folder, config, identity, chosen, dtype, stored)


def _merge(
    job: _Job,
    files: WeightFiles,
    adapter: Adapter,
    target: _Target,
    max_ram: int,
    probe: Sequence[str] | None,
    peak: PeakMemory,
    started: float,
) -> MergeReceipt:
    out, partial = target.out, target.partial
    plans = _plans(job, files, adapter, both=probe is not None)
    plan = plans[job.base]
    sizes = size_pieces(plan, max_ram, num_workers())
    beside = [path for path in files_beside_weights(job.folder) if not is_for_pictures(path)]
    there = sum(512 * path.stat().st_blocks for path in partial.glob("files/*")) if partial.is_dir() else 0
    check_space(out, plan.size + sum(path.stat().st_size for path in beside) - there)
    try:
        with open_journal(partial, job.key()) as journal:
            try:
                done = run_merge(plan, sizes, Arithmetic(files, adapter, job.compute), journal)
            except UserError:
                # It would end like this again.
                journal.remove()
                raise
            _write_beside(journal.files, job, plan, beside)
            seconds = time.monotonic() - started
            errors = None if probe is None else _errors(job, plans, files, adapter, probe)
            receipt = _receipt(job, plan, adapter, done, seconds, peak.bytes, max_ram, errors)
            journal.publish(out, job.key(), receipt.as_dict())
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); the same command resumes from {partial}"
        ) from error
    return receipt


def _plans(job: _Job, files: WeightFiles, adapter: Adapter, both: bool) -> dict[str, Plan]:
    """Return the plan of the merge and, if `both`, of one onto the other base, where there is one."""
    quantised = job.manifest.quantized_modules
    other = both and quantised and not job.stored_in_nf4
    return {
        base: plan_merge(
            job.config,
            files,
            adapter,
            quantised=quantised,
            stored_in_nf4=job.stored_in_nf4,
            nf4_exact=base == "nf4-exact",
            compute=job.compute,
            dtype=job.dtype,
        )
        for base in BASES
        if base == job.base or other
    }


def _errors(
    job: _Job, plans: Mapping[str, Plan], files: WeightFiles, adapter: Adapter, prompts: Sequence[str]
) -> dict[str, Any]:
    trained = "nf4-exact" if job.manifest.quantized_modules else "bf16"
    tokenizer = load_tokenizer(str(job.folder), {"trust_remote_code": False, "local_files_only": True})
    logger.info("Probe: the LLM is read %d times over", len(plans) + 2)
    return probe_errors(
        plans, trained, prompts, tokenizer, config=job.config, files=files, adapter=adapter, compute=job.compute
    )


def _write_beside(folder: Path, job: _Job, plan: Plan, beside: Sequence[Path]) -> None:
    """Write everything but the weights: config, index, tokenizer."""
    config = read_json(job.folder / "config.json")
    if job.identity.wrapper is not None:
        config = alone_in_file(job.config, config)
    for key in ("quantization_config", "torch_dtype"):
        config.pop(key, None)
    config["dtype"] = str(job.dtype).removeprefix("torch.")
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    index = plan.index()
    if index is not None:
        write_text(folder / "model.safetensors.index.json", index.decode("utf-8"))
    for path in beside:
        shutil.copyfile(path, folder / path.name)


def _receipt(
    job: _Job,
    plan: Plan,
    adapter: Adapter,
    done: Done,
    seconds: float,
    peak: int,
    max_ram: int,
    probe: dict[str, Any] | None,
) -> MergeReceipt:
    note = _NOTES["bf16 after nf4" if job.base == "bf16" and job.manifest.quantized_modules else job.base]
    name = next(name for name, dtype in DTYPES.items() if dtype == job.dtype)
    if job.compute == torch.float32 and job.dtype != torch.float32:
        note += (
            f"; the run computed in float32 and the new weights are rounded to {name}, which takes part of what LoRA "
            "added: --dtype fp32 keeps it, --probe measures it"
        )
    return MergeReceipt(
        base=job.base,
        dtype=name,
        note=note,
        llm=job.saved.name,
        base_files=job.identity.files_to_json(),
        checkpoint=str(job.checkpoint),
        step=job.manifest.step,
        checkpoint_sha256=job.manifest_sha256,
        files=done.sha256,
        bytes=plan.size,
        resumed_bytes=done.resumed,
        tensors=len({tensor.name for tensor in plan.tensors}),
        merged=len({tensor.name for tensor in plan.tensors if tensor.delta is not None}),
        adapter_tensors=len(adapter.files.tensors),
        seconds=seconds,
        mb_per_second=(plan.size - done.resumed) / 1e6 / max(seconds, math.ulp(1.0)),
        peak_bytes=peak,
        max_ram_bytes=max_ram,
        probe=probe,
    )
