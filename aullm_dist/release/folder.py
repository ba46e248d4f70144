"""From a checkpoint to a release folder, which is either complete or not there."""

import datetime
import gc
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from aullm_dist.errors import UserError
from aullm_dist.files import staged_folder
from aullm_dist.model.llm import load_tokenizer
from aullm_dist.model.reasoner import Reasoner
from aullm_dist.release.card import card_text, citation_text, release_title
from aullm_dist.release.facts import commit_of, describe_base, scores_of, training_clips, training_lines
from aullm_dist.release.layout import (
    ADAPTER_FOLDER,
    CARD_FILE,
    CITATION_FILE,
    CONFIG_FILE,
    LLM_FOLDER,
    Format,
    table_of,
    write_release_manifest,
)
from aullm_dist.release.loading import Release, load, load_unchecked, prompt_facts
from aullm_dist.release.origin import find_home, find_preparation
from aullm_dist.release.probe import Probe, answer_probe, probe_clips, probe_facts, write_probe
from aullm_dist.training.checkpoint import ADAPTER_CONFIG_FILE, MODULES_CONFIG_FILE
from aullm_dist.training.manifest import json_bytes, read_manifest
from aullm_dist.training.tensor_plan import ADAPTER_FILE, MODULES_FILE

_OWN_RUN = (
    "Scores of the models of all folds of this run, each on the subjects that it was not trained on; the model in this "
    "folder is one of them."
)
_OTHER_RUN = (
    "Scores of other models, from another run, each on subjects that it was not trained on; the model in this folder was "
    "not scored itself."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What was written."""

    folder: Path
    format: Format
    threshold_policy: str
    difference: float | None
    """Largest difference of a logit on the probe clips between the merged and the trained model; None for an adapter
    release, which is the trained model."""
    merge: Any
    """What the merge of the LLM returned; None for an adapter release."""


def export(
    checkpoint: Path,
    out: Path,
    *,
    format: Format,
    merge: Callable[[Path], Any] | None = None,
    llm: str | None = None,
    device: str | torch.device | None = None,
    scores: Path | None = None,
    authors: Sequence[str] = (),
) -> Export:
    """Write a release folder; afterwards it is complete, and loads as the model that was trained.

    Args:
        checkpoint: a checkpoint, or a fold, of which the newest valid checkpoint is taken.
        out: the folder to be made; it may exist if it is empty.
        format: `adapter` keeps LoRA beside the LLM, which the release then needs; `merged` holds an LLM of its own.
        merge: for `merged`: writes the LLM with LoRA merged into it, and its tokenizer, to the folder that it is given.
        llm: folder or Hugging Face name of the base LLM, where it is no longer found at its recorded place.
        device: where the answers are computed that the release records; None takes the GPU if there is one.
        scores: run whose held-out scores go onto the card; None takes the checkpoint's own run. For a model that was
            trained on everything: the run of the same settings that held subjects out.
        authors: names for CITATION.cff.

    Raises:
        UserError: `out` is taken, there is no valid checkpoint, it has no LLM, or the LLM is not the one that its
            adapter was trained on. Nothing is written then.
    """
    assert (merge is not None) == (format == "merged"), "a merged release, and only that, is told how to merge"
    _check_out(out)
    trained = load(checkpoint, device=device, llm=llm)
    if trained.config.model.llm == "none":
        raise UserError(f"{trained.path}: is of the baseline led_cnn, which has no LLM to release; allowed: AULLM++")
    target, policy, precision = trained.device, trained.thresholds.policy, trained.config.training.precision
    card = _card_facts(trained, format, scores)
    clips = probe_clips(trained.num_frames, trained.size)
    answers = answer_probe(trained.model, clips)
    try:
        with staged_folder(out) as folder:
            _write_ours(folder, trained, format)
            _write_texts(folder, trained, out.absolute().name, card, authors)
            # Two LLMs at once may not fit.
            del trained
            gc.collect()
            receipt, difference = None, None
            if merge is not None:
                receipt = merge(folder / LLM_FOLDER)
                merged = answer_probe(load_unchecked(folder, target, table_of(folder)).model, clips)
                difference, answers = float((merged - answers).abs().max()), merged
            write_probe(folder, Probe(clips=clips, logits=answers))
            facts = probe_facts(precision, target) | {"difference_to_trained": difference}
            write_release_manifest(folder, {"release_format": format, "probe": facts})
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give a folder that you may write") from error
    return Export(folder=out, format=format, threshold_policy=policy, difference=difference, merge=receipt)


def _check_out(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is taken; give a new or an empty folder")


def _write_ours(folder: Path, trained: Release, format: Format) -> None:
    """Write everything but the merged LLM, the probe and the manifest."""
    source = trained.path
    shutil.copyfile(source / MODULES_FILE, folder / MODULES_FILE)
    if format == "adapter" and (source / ADAPTER_FILE).is_file():
        (folder / ADAPTER_FOLDER).mkdir()
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            shutil.copyfile(source / name, folder / ADAPTER_FOLDER / name)
    model = trained.config.model
    common = {"trust_remote_code": model.trust_remote_code, "local_files_only": Path(model.llm).is_dir()}
    load_tokenizer(model.llm, common).save_pretrained(folder)
    (folder / CONFIG_FILE).write_bytes(json_bytes(_describe(trained, format)))


def _card_facts(trained: Release, format: Format, scores: Path | None) -> dict[str, Any]:
    """Collect what the card says, before anything is written."""
    manifest = read_manifest(trained.path)
    home = find_home(trained.path)
    preparation = find_preparation(trained.config, home)
    run = scores if scores is not None else home.run if home is not None else None
    found = scores_of(run)
    if scores is not None and found.metrics is None:
        raise UserError(f"{scores}: no scores for the card ({found.missing}); give a run that was evaluated")
    own = scores is None
    return {
        "format": format,
        "base": describe_base(manifest["base"]["name"]),
        "synthetic": preparation.synthetic,
        "counts": training_clips(home, preparation, trained.aus),
        "scores": found,
        "scores_preface": _OWN_RUN if own else _OTHER_RUN,
        "training": training_lines(trained.config, manifest, home),
        "versions": manifest["versions"],
        "commit": commit_of(home),
    }


def _write_texts(folder: Path, trained: Release, name: str, card: dict[str, Any], authors: Sequence[str]) -> None:
    (folder / CARD_FILE).write_text(card_text(trained, folder=name, **card), encoding="utf-8")
    title = release_title(trained, card["base"], card["synthetic"])
    today = datetime.datetime.now(datetime.UTC).date()
    citation = citation_text(title, card["base"], trained.corpora, authors, today)
    (folder / CITATION_FILE).write_text(citation, encoding="utf-8")


def _describe(trained: Release, format: Format) -> dict[str, Any]:
    """Return config.json: what must be known to load the release, and to use it."""
    manifest = read_manifest(trained.path)
    function = json.loads((trained.path / MODULES_CONFIG_FILE).read_bytes())
    settings = asdict(trained.config.model)
    # What the run's machine had, or is given at loading, says nothing of the function.
    for key in (
        "llm",
        "architecture",
        "trust_remote_code",
        "activation_checkpointing",
        "compile",
        "attention",
        "kernels",
    ):
        del settings[key]
    if format == "merged":
        settings |= {"quantization": "none", "lora_rank": 0}
        function["quantization"] = "none"
    reasoner: Reasoner = trained.model.reasoner
    return {
        "model_type": "aullm",
        "architectures": ["AULLMModel"],
        "format": format,
        "aus": list(trained.aus),
        "thresholds": {f"AU{au}": trained.thresholds.values[au] for au in trained.aus},
        "threshold_policy": trained.thresholds.policy,
        "preprocessing": {"num_frames": trained.num_frames, "size": trained.size, "crop": trained.crop},
        "corpora": list(trained.corpora),
        "prompt": prompt_facts(reasoner.prompt),
        "base": manifest["base"],
        "function": function,
        "settings": {
            "model": settings,
            "data": {"num_frames": trained.num_frames, "size": trained.size},
            "training": {"precision": trained.config.training.precision, "seed": trained.config.training.seed},
        },
    }
