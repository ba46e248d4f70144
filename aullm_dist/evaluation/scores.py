"""Defines the types of scores that are computed, written to `metrics.json` and rendered: dictionaries with known keys.

All values are fractions, None where a score is undefined.
"""

from typing import Any, Literal, TypedDict

Metric = Literal["f1_binary", "f1_macro", "auc"]

Interval = list[float] | None
"""Low and high."""


class MetricScores(TypedDict):
    """The headline metrics."""

    f1_binary: float
    f1_macro: float
    auc: float | None


class FloorScores(MetricScores):
    """What predictors without evidence reach: the floor of each metric, and all of them."""

    details: dict[str, dict[Metric, float]]
    """Scores of `all_negative`, `all_positive` and `random`."""


class AuScores(MetricScores):
    """Scores of one AU."""

    support: int
    """Clips that show it."""
    negatives: int
    floors: FloorScores


class Scores(TypedDict):
    """What `summarise` returns."""

    mean: MetricScores
    floors: FloorScores
    per_au: dict[str, AuScores]
    """By `AU<number>`."""


class Intervals(TypedDict):
    """What `subject_bootstrap` returns: 95% percentile intervals over subjects."""

    level: float
    unit: str
    resamples: int
    seed: int
    num_subjects: int
    mean: dict[str, Interval]
    """By score of `resample`."""
    per_au: dict[str, dict[str, Interval]]
    """By `AU<number>`."""


class InnerAuScores(MetricScores):
    """Scores of one AU with the thresholds of the inner subjects."""

    threshold_low: float
    """Lowest probability that a fold chose."""
    threshold_high: float


class InnerScores(TypedDict):
    """Scores with thresholds chosen on the inner held-out subjects of each fold."""

    threshold_policy: str
    mean: MetricScores
    per_au: dict[str, InnerAuScores]
    ci: Intervals | None
    folds: dict[str, dict[str, float]]
    """Probabilities by AU, by `fold-<number>`."""
    folds_without_inner: list[str]


class CorpusScores(Scores):
    """Scores of the clips of one corpus."""

    num_clips: int
    aus: list[int]


class LeakyVariant(TypedDict):
    """Scores of a choice made on the test labels."""

    name: str
    chosen: dict[str, Any]
    mean: MetricScores


class LeakyScores(TypedDict):
    """What `leaky_variants` returns."""

    epochs: list[int]
    variants: list[LeakyVariant]


class RankingScores(TypedDict):
    """What `ranking` returns."""

    mean: dict[str, float | None]
    per_au: dict[str, dict[str, Any]]


class FoldCounts(TypedDict):
    """How many folds were scored."""

    expected: int
    present: int
    missing: list[str]
    """Names."""


class Scored(TypedDict):
    """What was scored, and whatever makes it less than the whole run."""

    protocol: str
    corpora: list[str]
    direction: str | None
    """Which way a cross-domain run goes."""
    num_clips: int
    num_subjects: int
    folds: FoldCounts
    epochs: dict[str, int]
    """By `fold-<number>`."""
    notes: list[str]
    caveats: list[str]
    """What a reader must know of the run before its numbers (`caveats.caveats`)."""


class LadderStep(TypedDict):
    """What a stage adds to the one before it, on the same clips."""

    difference: float | None
    ci: Interval


class LadderEntry(TypedDict):
    """Scores of one stage of the answer."""

    stage: str
    mean: MetricScores
    step: dict[Metric, LadderStep] | None
    """None for the first stage."""


class Metrics(Scored, Scores):
    """What `metrics.json` holds."""

    unit: str
    threshold: float
    threshold_policy: str
    aus: list[int]
    ci: Intervals | None
    ranking: RankingScores
    ladder: list[LadderEntry] | None
    """None without stages."""
    inner_thresholds: InnerScores | None
    per_corpus: dict[str, CorpusScores] | None
    leaky: LeakyScores | None
