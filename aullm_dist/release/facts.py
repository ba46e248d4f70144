"""Collects model-card data (datasets, training, scores) from the files of a run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from aullm_dist.data.clips import read_samples
from aullm_dist.data.corpora import Provenance, find_corpus
from aullm_dist.data.protocols import SampleInfo
from aullm_dist.errors import UserError
from aullm_dist.evaluation.evaluate import score_run
from aullm_dist.evaluation.scores import Metrics
from aullm_dist.files import read_json
from aullm_dist.llm.tiny import is_tiny
from aullm_dist.log import get_logger
from aullm_dist.release.origin import Home, Origin, Preparation
from aullm_dist.runs.paths import RunPaths

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class TrainingClips:
    """What one corpus gave to the training side of the fold."""

    corpus: str
    clips: int
    subjects: int
    positives: Mapping[int, int]
    """Clips that show the AU, by AU number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The LLM as the card names it."""

    title: str
    hub_name: str | None
    """Its name on the Hugging Face Hub, None where it is not known to be there."""
    licence: str | None
    """As its own card says it."""
    is_random: bool
    """Whether it is the tiny backbone, whose weights are random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Held-out scores of a run, or why there are none."""

    metrics: Metrics | None
    """As `score_run` returns them."""
    missing: str
    """Why `metrics` is None; empty otherwise."""


def training_clips(home: Home | None, preparation: Preparation, aus: Sequence[int]) -> list[TrainingClips]:
    """Count what the fold was trained on, per corpus; empty where run or datasets are not there any more."""
    if home is None or not preparation.folders:
        return []
    known = {sample.sample_id: sample for sample in read_samples(preparation.folders)}
    trained = [known[name] for name in home.plan.folds[home.fold].train if name in known]
    if len(trained) < len(home.plan.folds[home.fold].train):
        return []
    return [
        _counted(corpus, [s for s in trained if s.corpus == corpus], aus)
        for corpus in sorted({s.corpus for s in trained})
    ]


def _counted(corpus: str, samples: Sequence[SampleInfo], aus: Sequence[int]) -> TrainingClips:
    positives = Counter(au for sample in samples for au in sample.aus)
    return TrainingClips(
        corpus, len(samples), len({sample.subject for sample in samples}), {au: positives[au] for au in aus}
    )


def corpus_title(name: str) -> str:
    """Return a corpus's name as its makers write it."""
    spec = find_corpus(name)
    return name if spec is None else spec.title


def corpus_licence(name: str) -> str:
    """Return the line of a corpus among the licences: who made it, and how they give it away."""
    spec = find_corpus(name)
    provenance = Provenance() if spec is None else spec.provenance
    return f"{corpus_title(name)}: of {provenance.makers}, {provenance.licence}."


def scores_of(run: Path | None) -> Scores:
    """Score the stored answers of a run; a run without a test side, or without answers, gives the reason."""
    if run is None:
        return Scores(metrics=None, missing="the checkpoint lies in no run folder")
    try:
        return Scores(metrics=score_run(run), missing="")
    except UserError as error:
        logger.warning("the card has no scores: %s", error)
        return Scores(metrics=None, missing=str(error).replace(str(run), "the run"))


_QUANTISATIONS = {
    "none": "none",
    "nf4": "NF4, double quantisation",
    "nf4_experts": "NF4, double quantisation, experts included",
}


def describe_base(name: str, now: str | None = None) -> Base:
    """Return how to name an LLM that was given by folder or by Hugging Face name; `now` is where it is if it moved."""
    folder = Path(name)
    hub_name = None if folder.is_absolute() or folder.exists() else name
    for part in folder.parts:
        # A folder of the Hub's cache: models--ORG--NAME/snapshots/COMMIT.
        if part.startswith("models--") and part.count("--") == 2:
            hub_name = "/".join(part.split("--")[1:])
    card = folder / "README.md" if folder.is_dir() else hub_name and try_to_load_from_cache(hub_name, "README.md")
    licence = None
    if isinstance(card, str | Path) and Path(card).is_file():
        licence = (metadata_load(card) or {}).get("license")
    return Base(
        title=hub_name or folder.name,
        hub_name=hub_name,
        licence=licence if isinstance(licence, str) else None,
        is_random=is_tiny(name if now is None else now),
    )


def commit_of(home: Home | None) -> str | None:
    """Return the commit of aullm-dist that the run recorded, None where it recorded none."""
    if home is None or not RunPaths(home.run).environment.exists():
        return None
    try:
        commit = read_json(RunPaths(home.run).environment).get("commit")
    except UserError as error:
        logger.warning("the card names no commit: %s", error)
        return None
    return commit if isinstance(commit, str) else None


def training_rows(origin: Origin) -> dict[str, str]:
    """Return how the model was trained, as rows of a table."""
    model, training, home = origin.config.model, origin.config.training, origin.home
    rows = {}
    if home is not None:
        fold = home.plan.folds[home.fold]
        rows = {
            "protocol": f"{home.plan.protocol}, fold {fold.index} of {len(home.plan.folds)} ({fold.name})",
            "clips": f"{len(fold.train)} trained on, {len(fold.inner)} inner held-out, {len(fold.test)} tested",
        }
    lora = f"rank {model.lora_rank}, alpha {model.lora_alpha:g}, on {', '.join(model.lora_targets)}"
    revision, wrapper = origin.base.revision, origin.base.wrapper
    return {
        **({"revision of the base LLM": revision} if revision else {}),
        **({"the LLM is": f"the text decoder inside a {wrapper} model"} if wrapper else {}),
        **rows,
        "quantisation of the base": _QUANTISATIONS[model.quantization],
        "LoRA": lora,
        "read-out": model.readout,
        "precision": training.precision,
        "seed": str(training.seed),
        "optimizer steps": f"{origin.manifest.step}, each of {_clips_per_step(origin)} clips",
        "counterfactual regularization": "on" if origin.config.counterfactual.enabled else "off",
    }


def _clips_per_step(origin: Origin) -> int:
    # Answering has no steps, so `find_trained` sets the batch to what is answered at once.
    return origin.manifest.config["training"]["global_batch"]
