"""Exports a checkpoint to a release folder, which is either complete or not there."""

import datetime
import gc
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from aullm_dist.checkpoint.base_identity import base_differences, base_identity
from aullm_dist.checkpoint.manifest import verify_checkpoint
from aullm_dist.checkpoint.store import ADAPTER_CONFIG_FILE
from aullm_dist.checkpoint.tensor_plan import ADAPTER_FILE, MODULES_FILE
from aullm_dist.errors import UserError
from aullm_dist.files import is_new_or_empty, staged_folder
from aullm_dist.llm.base_check import check_files
from aullm_dist.llm.files import load_config, load_tokenizer, present_folder
from aullm_dist.model.prompt import build_prompt
from aullm_dist.release.card import CardFacts, card_text, citation_text, release_title
from aullm_dist.release.describe import describe
from aullm_dist.release.facts import commit_of, describe_base, scores_of, training_clips, training_rows
from aullm_dist.release.hub_results import eval_results_text
from aullm_dist.release.layout import (
    ADAPTER_FOLDER,
    CARD_FILE,
    CITATION_FILE,
    CONFIG_FILE,
    EVAL_RESULTS_FILE,
    LLM_FOLDER,
    Format,
    ReleaseFacts,
    table_of,
    write_release_manifest,
)
from aullm_dist.release.loading import load_origin, load_unchecked, pick_device
from aullm_dist.release.origin import Origin, find_origin
from aullm_dist.release.probe import Probe, answer_probe, probe_clips, probe_facts, write_probe
from aullm_dist.signed import json_bytes

_OWN_RUN = (
    "Scores of the models of all folds of this run, each on the subjects that it was not trained on; the model in this "
    "folder is one of them."
)
_OTHER_RUN = (
    "Scores of other models, from another run, each on subjects that it was not trained on; the model in this folder "
    "was not scored itself."
)
# Weights that would be unpickled when they are loaded.
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class MergeFacts(Protocol):
    """What a release has to know of the merge of its LLM."""

    @property
    def note(self) -> str:
        """What was added to what, in a sentence for the card."""
        ...

    @property
    def probe(self) -> dict[str, Any] | None:
        """Errors that were measured (`merge.logit_errors`), None if they were not asked for."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Return the receipt as JSON values."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written."""

    folder: Path
    format: Format
    threshold_policy: str
    difference: float | None
    """Largest difference of a logit on the probe clips between the merged and the trained model; None for an adapter
    release, which is the trained model, and where no answers were recorded."""
    merge: MergeFacts | None
    """What `merge` returned; None for an adapter release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CardOptions:
    """What a user adds to the model card and the citation of a release."""

    scores: Path | None = None
    """Run whose held-out scores go onto the card; None takes the checkpoint's own run. For a model that was trained on
    everything: the run of the same settings that held subjects out."""
    authors: Sequence[str] = ()
    """Names for CITATION.cff."""
    benchmark: str | None = None
    """Id of the Hub's dataset, `ORG/DATASET`, whose leaderboard shows the scores; None names the corpora."""


def export(
    checkpoint: Path,
    out: Path,
    *,
    format: Format,
    merge: Callable[[Path], MergeFacts] | None = None,
    llm: str | None = None,
    record: bool = True,
    device: str | torch.device | None = None,
    card: CardOptions | None = None,
) -> Export:
    """Write a release folder; afterwards it is complete, and loads as the model that was trained.

    Args:
        checkpoint: a checkpoint, or a fold, of which the newest valid checkpoint is taken.
        out: the folder to be made; it may exist if it is empty.
        format: `adapter` keeps LoRA next to the LLM, which the release then needs; `merged` holds an LLM of its own.
        merge: for `merged`: writes the LLM with LoRA merged into it, and its tokenizer, to the folder that it is given.
        llm: folder or Hugging Face name of the base LLM, where it is no longer found at its recorded place.
        record: whether to answer the probe clips, which takes the memory of the whole LLM. A release without recorded
            answers can be verified by its files alone.
        device: where the answers are computed; None takes the GPU if there is one.
        card: what the user adds to the model card; None adds nothing.

    Raises:
        UserError: `out` is taken, there is no valid checkpoint, it has no LLM, or the LLM is not the one that its
            adapter was trained on. Nothing is written then.
    """
    assert (merge is not None) == (format == "merged"), "a merged release, and only that, is given a way to merge"
    target = pick_device(device)
    if not is_new_or_empty(out):
        raise UserError(f"{out}: is taken; give a new or an empty folder")
    origin = find_origin(checkpoint, llm)
    tokenizer = _check(origin)
    card = card or CardOptions()
    facts = _card_facts(origin, format, card.scores)
    probe = _record(load_origin(origin, target).model, origin) if record else None
    receipt, difference = None, None
    try:
        with staged_folder(out) as folder:
            _write_ours(folder, origin, tokenizer, format)
            if merge is not None:
                receipt = merge(folder / LLM_FOLDER)
                _refuse_pickles(folder)
            if merge is not None and probe is not None:
                gc.collect()  # of the trained model: two LLMs at once may not fit
                merged = _record(load_unchecked(folder, target, table_of(folder)).model, origin)
                difference, probe = float((merged.logits - probe.logits).abs().max()), merged
            recorded = None
            if probe is not None:
                write_probe(folder, probe)
                recorded = probe_facts(origin.config.training.precision, target, difference)
            _write_texts(folder, origin, out.absolute().name, facts, receipt, difference, card)
            write_release_manifest(
                folder,
                ReleaseFacts(
                    release_format=format, probe=recorded, merge=None if receipt is None else _public(receipt)
                ),
            )
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({error}); give a folder that you may write") from error
    return Export(
        folder=out, format=format, threshold_policy=origin.thresholds.policy, difference=difference, merge=receipt
    )


def _record(model: torch.nn.Module, origin: Origin) -> Probe:
    clips = probe_clips(origin.config.data.num_frames, origin.config.data.size)
    return Probe(clips=clips, logits=answer_probe(model, clips))


def _check(origin: Origin) -> object:
    """Refuse, before anything large is read, what cannot be released; return the LLM's tokenizer."""
    if origin.config.model.llm == "none":
        network = origin.config.model.network
        raise UserError(f"{origin.folder}: is of the baseline {network}, which has no LLM to release; allowed: AULLM++")
    problems = verify_checkpoint(origin.folder)
    if problems:
        raise UserError(f"checkpoint {origin.folder} is refused: {problems[0]}")
    model = origin.config.model
    common = {"trust_remote_code": model.trust_remote_code, "local_files_only": Path(model.llm).is_dir()}
    llm, folder = load_config(model.llm, common), present_folder(model.llm)
    if folder is not None:
        check_files(model.llm, folder, llm)
    found = base_identity(model.llm, llm.to_dict(), folder)
    differences = base_differences(origin.manifest.base, found)
    if differences:
        raise UserError(f"checkpoint {origin.folder} is of another model: {differences[0]}")
    return load_tokenizer(model.llm, common)


def _write_ours(folder: Path, origin: Origin, tokenizer: Any, format: Format) -> None:
    """Write the trained weights, the tokenizer and config.json."""
    source, model = origin.folder, origin.config.model
    shutil.copyfile(source / MODULES_FILE, folder / MODULES_FILE)
    if format == "adapter":
        (folder / ADAPTER_FOLDER).mkdir()
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            shutil.copyfile(source / name, folder / ADAPTER_FOLDER / name)
    tokenizer.save_pretrained(folder)
    prompt = build_prompt(origin.aus, tokenizer, readout=model.readout, use_structure=model.structure)
    (folder / CONFIG_FILE).write_bytes(json_bytes(describe(origin, prompt, format)))


def _merge_note(receipt: MergeFacts) -> str:
    """Return what was merged into what and, where it was measured, what that costs."""
    if receipt.probe is None:
        return receipt.note
    ways = {"live": "the trained model in its own arithmetic"}
    told = [
        f"{ways.get(name, f'LoRA merged onto {name}')} {error:.1e}"
        for name, error in receipt.probe["relative_logit_error"].items()
    ]
    many = receipt.probe["prompts"]
    return f"{receipt.note}. Relative errors of its logits on {many} prompt{'s' * (many > 1)}: {', '.join(told)}"


def _public(receipt: MergeFacts) -> dict[str, Any]:
    """Return a receipt without where things lay on this machine, which is nobody else's business."""
    return {key: value for key, value in receipt.as_dict().items() if key not in ("checkpoint", "llm")}


def _refuse_pickles(folder: Path) -> None:
    found = [path for path in folder.rglob("*") if path.suffix in _PICKLES]
    assert not found, f"{found[0]}: a release holds safetensors only"


def _card_facts(origin: Origin, format: Format, scores: Path | None) -> CardFacts:
    """Collect what the card says of the run."""
    home = origin.home
    found = scores_of(scores if scores is not None else home.run if home is not None else None)
    if scores is not None and found.metrics is None:
        raise UserError(f"{scores}: no scores for the card ({found.missing}); give a run that was evaluated")
    return CardFacts(
        format=format,
        base=describe_base(origin.base.name, origin.config.model.llm),
        counts=training_clips(home, origin.preparation, origin.aus),
        scores=found,
        scores_preface=_OWN_RUN if scores is None else _OTHER_RUN,
        training=training_rows(origin),
        commit=commit_of(home),
    )


def _write_texts(
    folder: Path,
    origin: Origin,
    name: str,
    facts: CardFacts,
    receipt: MergeFacts | None,
    difference: float | None,
    card: CardOptions,
) -> None:
    note = None if receipt is None else _merge_note(receipt)
    text = card_text(origin, facts, folder=name, merge_note=note, difference=difference)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")
    today = datetime.datetime.now(datetime.UTC).date()
    corpora, synthetic = origin.preparation.corpora, origin.preparation.synthetic
    citation = citation_text(release_title(origin, facts.base), facts.base, corpora, card.authors, today)
    (folder / CITATION_FILE).write_text(citation, encoding="utf-8")
    metrics = facts.scores.metrics
    if metrics is not None:
        (folder / EVAL_RESULTS_FILE).parent.mkdir()
        others = card.scores is not None
        entries = eval_results_text(metrics, synthetic, benchmark=card.benchmark, date=today, others=others)
        (folder / EVAL_RESULTS_FILE).write_text(entries, encoding="utf-8")
